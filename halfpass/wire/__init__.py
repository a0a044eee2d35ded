import os

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # its core would log what our errors say; read when it is imported

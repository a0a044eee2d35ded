"""halfpass on NVFlare, over its Collab API: docs/how-to/nvflare.md shows how to start a job.

`job.py` makes a job of settings, simulates it or gives it to a server in production; `server.py` and `client.py` are
what NVFlare then builds at the server and at each site; `exchange.py` carries a run's messages. NVFlare is not needed
by the rest of halfpass: pip install 'halfpass[nvflare]'.
"""

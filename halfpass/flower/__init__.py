"""halfpass on Flower: a ServerApp and a ClientApp that live in this package. How to name
them: docs/how-to/flower.md.

`server_app.py` and `client_app.py` are what Flower starts; `exchange.py` carries a run's messages; `settings.py` reads
an app's settings. Flower is not needed by the rest of halfpass: pip install 'halfpass[flower]'.
"""

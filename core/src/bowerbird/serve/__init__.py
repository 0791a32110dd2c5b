"""The HTTP service and the web page of a gallery (extra ``serve``): ``bowerbird serve GALLERY``.

``app.create_app`` makes the ASGI application of one gallery; ``server.Server`` holds what its routes share. Imports of
FastAPI, torch and the encoders happen inside, so that the rest of the command line never pays for them.
"""

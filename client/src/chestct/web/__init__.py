"""The page `chestct web` and its API: a thin client of Triton that keeps nothing.

`chestct.web.app.create_app` makes the ASGI application; `chestct.cli.web` runs it.
"""

"""The command line: options become settings, settings one workflow call, its result a rendering.

``app.py`` knows the commands, ``options.py`` their options, ``console.py`` the terminal,
``render.py`` what several commands show; ``NAME.py`` is the command of that name. Nothing here
loops over data, and nothing imports torch at the top.
"""

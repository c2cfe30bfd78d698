"""Pictures and the self-contained HTML page of one or many runs.

``figures`` is what a figure is, ``plots`` draws the kinds there are, ``sections`` holds one file
per kind of run, ``page`` puts them together. Nothing here loads a model or asks a judge.
"""

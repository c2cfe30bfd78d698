"""Pictures and the self-contained HTML page of one or many runs.

``figure`` is what a figure is, ``figures``, ``dots`` and ``grids`` draw the kinds there are,
``sections`` holds one file per kind of run, ``page`` puts them together. Nothing here loads a model
or asks a judge.
"""

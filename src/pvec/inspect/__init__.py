"""pvec in the evaluation framework ``inspect_ai`` (the extra ``inspect``), by entry point.

``provider`` runs steered models, ``served`` asks a ``pvec serve``, ``scorers`` judges answers on a
trait and projects them on vectors; ``bridge`` is what they share. ``registry`` is what
``inspect_ai`` loads.
"""

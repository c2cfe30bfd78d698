"""Judges give an answer a score from 0 to 100, or say why they did not.

``base`` is the contract, ``openai`` asks any OpenAI-compatible server, ``local`` asks a model in
this process, ``contrast`` compares likelihoods under opposite instructions (``measurement`` for a
run, ``calibration`` to the scale), ``scales`` turns token probabilities into scores, ``prompts``
holds the words.
"""

"""Prompts → embeddings, by the text encoder that a model was trained with.

Takes: a folder, texts.  Gives: prompts.
May touch: that folder (reading), files of embeddings.
"""

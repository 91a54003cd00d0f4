"""Texts to vectors with a trained model: what loads one, embeds files of texts, and searches them."""

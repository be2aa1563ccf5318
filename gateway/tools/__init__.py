"""Calls of functions in what a model writes, and thoughts before its answer.

toolbox     what an answer may call, and whether it must
pieces      what an answer is made of: words, thoughts, calls
syntaxes    how each family of models writes a call, one file a family
reader      an answer's text as it grows -> pieces
reasoning   thoughts, between their marks
grammar     the grammar of an answer with calls; notation has its parts

Knows text alone: nothing of HTTP, of SQL or of how an answer is spelled on the wire.
"""

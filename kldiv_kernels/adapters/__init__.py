"""This library under the call signatures of other frameworks; each module imports its framework only when used."""

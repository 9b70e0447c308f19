"""Files: atomic writes and safe loading.

Nothing here knows what a file means.
"""

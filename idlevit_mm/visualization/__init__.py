"""Pictures of active tokens, and what a data sample contributes to them.

Nothing is imported here: drawing pulls in matplotlib, which computing does without.
"""

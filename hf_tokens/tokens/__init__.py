"""Tokens and the ledger of a pass: which are left, where they came from, and what that means for all that lies over them."""

"""The checks of the contract, a file for each part of what a method owes. pytest shows what their assertions compared."""

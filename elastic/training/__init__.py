"""Trains: the loop, the job it trains, the order-fixed reduction, and where randomness and data come from."""

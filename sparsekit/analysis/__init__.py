"""What a pruning would cost and did cost: sensitivity, allocation, forecast, diagnosis, a page to read."""

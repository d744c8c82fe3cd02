"""The least a Flower app can be: stock FedAvg, and clients that answer with one fixed array."""

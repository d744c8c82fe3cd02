"""What privacy costs in usefulness: federated private adapters on drawn sites, against the same without privacy."""

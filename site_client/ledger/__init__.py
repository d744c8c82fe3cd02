"""The site's privacy ledger: what every use of its patients has cost, written before it happens."""

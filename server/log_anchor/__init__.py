"""The coordinator's own log: its acts, and the heads of the parties' logs, each anchored with a proof that it only grew."""

"""Names of the targets, apart from them: their code must not be imported before it is watched for coverage."""

ROOM = "PIXCELL_FUZZ_ROOM"
"""Environment variable: the folder for what targets write; a fuzzer that stops runs no clean-up of its own."""

NAMES = (
    *("archive", "envelope", "documents", "json", "policy", "signed-policy", "log", "proof"),
    *("ledger-line", "ledger-export", "tile-png", "tile-jpeg", "authority", "public-key"),
)

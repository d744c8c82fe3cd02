"""Stock FedAvg, which writes down when each round begins; that is all it adds."""

import time
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

app = ServerApp()


class MarkedFedAvg(FedAvg):
    """FedAvg with a line in a file at the start of every round."""

    marks: Path

    def configure_train(self, server_round, *others):  # type: ignore[no-untyped-def]
        """Mark, then as ever."""
        mark(self.marks, f"{server_round}")
        return super().configure_train(server_round, *others)

    def aggregate_train(self, server_round, replies):  # type: ignore[no-untyped-def]
        """As ever; a round that lost a client would be no comparison."""
        found = list(replies)
        if any(reply.has_error() for reply in found):
            mark(self.marks, f"error {[reply.error for reply in found if reply.has_error()]}")
        return super().aggregate_train(server_round, found)


def mark(path: Path, text: str) -> None:
    """Add one line: the moment, and what began."""
    with path.open("a") as stream:
        stream.write(f"{time.time():.3f} {text}\n")


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the rounds."""
    config = context.run_config
    sites = int(config["sites"])
    strategy = MarkedFedAvg(
        fraction_evaluate=0.0, min_train_nodes=sites, min_available_nodes=sites, min_evaluate_nodes=0
    )
    strategy.marks = Path(str(config["marks"]))
    start = np.zeros_like(np.load(str(config["update"])))
    result = strategy.start(
        grid=grid, initial_arrays=ArrayRecord({"flat": Array(start)}), num_rounds=int(config["rounds"])
    )
    mark(strategy.marks, "end")
    for number, metrics in result.train_metrics_clientapp.items():
        mark(strategy.marks, f"cpu {number} {metrics['cpu']:.3f}")

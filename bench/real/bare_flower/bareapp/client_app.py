"""A client that reads the array that came and answers with its own, as long."""

import time

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Answer one round; `cpu` tells the processor seconds this process took until it could begin."""
    began = time.process_time()
    came = message.content["arrays"]["flat"].numpy()
    update = np.load(str(context.run_config["update"]))
    assert came.shape == update.shape and came.dtype == update.dtype
    content = RecordDict(
        {
            "arrays": ArrayRecord({"flat": Array(update)}),
            "metrics": MetricRecord({"num-examples": 1, "cpu": began}),
        }
    )
    return Message(content, reply_to=message)

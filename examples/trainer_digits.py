"""Example: trains the digits network of digits.py with Hugging Face's transformers.Trainer.

transformers and accelerate are not dependencies of this project; install both beside torch:

    .venv-torch/bin/python -m pip install transformers accelerate
    .venv-torch/bin/python examples/trainer_digits.py
"""

import argparse
import sys

import safetensors.torch
import torch
from digits import ROOT, WANTED_ACCURACY, digits, encoder
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import EvalPrediction, Trainer, TrainingArguments, set_seed

from bridge_client import Session, spawn
from bridge_client.torch import RemoteJaxFunction

OUT = ROOT / "out" / "trainer"


class Digits(nn.Module):
    """A torch encoder and a Flax head that return their loss, as Trainer requires."""

    def __init__(self, session: Session, is_mixed: bool) -> None:
        super().__init__()
        # Trainer's autocast does not apply inside the remote head.
        cast = torch.bfloat16 if is_mixed else None
        self.encoder, self.head = (
            encoder(),
            RemoteJaxFunction(session, name="model", cast_inputs=cast),
        )

    def forward(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.head(self.encoder(images)).float()
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class Rows(Dataset[dict[str, Tensor]]):
    """Images and labels in Trainer's format."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self._images, self._labels = images, labels

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"images": self._images[i], "labels": self._labels[i]}


def accuracy(predicted: EvalPrediction) -> dict[str, float]:
    return {
        "accuracy": float(
            (predicted.predictions.argmax(1) == predicted.label_ids).mean()
        )
    }


def main() -> int:
    options = parse_options()
    set_seed(0)
    train, test = (Rows(*part) for part in digits("cpu"))
    arguments = TrainingArguments(
        output_dir=str(OUT),
        num_train_epochs=options.epochs,
        per_device_train_batch_size=64,
        per_device_eval_batch_size=360,
        learning_rate=1e-3,
        lr_scheduler_type="linear",
        max_grad_norm=1.0,
        bf16=options.bf16,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_steps=50,
        remove_unused_columns=False,
    )
    with spawn(
        jax_model="examples.digits_head:model",
        python=ROOT / ".venv-jax/bin/python",
        cwd=ROOT,
    ) as session:
        trainer = Trainer(
            model=Digits(session, options.bf16),
            args=arguments,
            train_dataset=train,
            eval_dataset=test,
            compute_metrics=accuracy,
        )
        trainer.train()
        trainer.save_model()
        loaded = Digits(session, options.bf16)  # a new module, as in another program
        loaded.load_state_dict(safetensors.torch.load_file(OUT / "model.safetensors"))
        trainer.model = loaded
        reached = trainer.evaluate()["eval_accuracy"]
    print(f"test accuracy: {reached:.1%} (at least {WANTED_ACCURACY:.0%} expected)")
    return 0 if reached >= WANTED_ACCURACY else 1


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train a torch encoder and a Flax head with transformers' Trainer."
    )
    parser.add_argument(
        "--epochs",
        type=int,
        default=20,
        help="passes over the data (default: %(default)s)",
    )
    parser.add_argument(
        "--bf16", action="store_true", help="train under autocast in bfloat16"
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())

"""Example: trains the digits network of digits.py with Lightning.

The example shows checkpoints, mixed precision, gradient clipping and gradient accumulation.
Lightning is not a dependency of this project; install Lightning beside torch:

    .venv-torch/bin/python -m pip install lightning
    .venv-torch/bin/python examples/lightning_digits.py
"""

import argparse
import sys

import lightning
import torch
from digits import ROOT, WANTED_ACCURACY, digits, encoder
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from bridge_client import Session, spawn
from bridge_client.torch import RemoteJaxFunction

OUT = ROOT / "out" / "lightning"


class Digits(lightning.LightningModule):
    """A torch encoder and a Flax head, as one Lightning module."""

    def __init__(self, session: Session, precision: str) -> None:
        super().__init__()
        # Under bf16-mixed the head also computes in bfloat16; its parameters stay in float32.
        cast = torch.bfloat16 if precision == "bf16-mixed" else None
        self.network = nn.Sequential(
            encoder(), RemoteJaxFunction(session, name="model", cast_inputs=cast)
        )

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        images, labels = batch
        loss = nn.functional.cross_entropy(self.network(images), labels)
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        images, labels = batch
        self.log(
            "accuracy",
            (self.network(images).argmax(1) == labels).float().mean(),
            prog_bar=True,
        )

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def main() -> int:
    options = parse_options()
    lightning.seed_everything(0)
    train, test = (TensorDataset(*part) for part in digits("cpu"))
    batches, held_out = (
        DataLoader(train, batch_size=32, shuffle=True),
        DataLoader(test, batch_size=360),
    )
    with spawn(
        jax_model="examples.digits_head:model",
        python=ROOT / ".venv-jax/bin/python",
        cwd=ROOT,
    ) as session:
        best = ModelCheckpoint(
            OUT,
            filename="best",
            monitor="accuracy",
            mode="max",
            enable_version_counter=False,
        )
        trainer = lightning.Trainer(
            accelerator="cpu",
            max_epochs=options.epochs,
            precision=options.precision,
            gradient_clip_val=1.0,
            accumulate_grad_batches=2,
            callbacks=[best],
            logger=False,
            default_root_dir=OUT,
        )
        trainer.fit(Digits(session, options.precision), batches, held_out)
        # A new module, as in another program that continues from the checkpoint.
        loaded = Digits(session, options.precision)
        loaded.load_state_dict(
            torch.load(best.best_model_path, weights_only=True)["state_dict"]
        )
        (result,) = trainer.test(loaded, held_out, verbose=False)
    print(
        f"test accuracy: {result['accuracy']:.1%} (at least {WANTED_ACCURACY:.0%} expected)"
    )
    return 0 if result["accuracy"] >= WANTED_ACCURACY else 1


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train a torch encoder and a Flax head with Lightning."
    )
    parser.add_argument(
        "--epochs",
        type=int,
        default=20,
        help="passes over the data (default: %(default)s)",
    )
    parser.add_argument(
        "--precision",
        choices=("32-true", "bf16-mixed"),
        default="32-true",
        help="see Lightning",
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())

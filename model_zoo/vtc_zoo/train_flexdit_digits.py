# SPDX-License-Identifier: Apache-2.0
"""Fine-tune tiny-dit-digits for few tokens (FlexDiT): tiny-flexdit-digits.

Run as `python -m vtc_zoo.train_flexdit_digits --out DIR [--smoke]`. The model and the new weights
learn together, by the loss that the model was trained by and nothing else. Every step of the
training has one number of tokens, and times from the interval of noise that it is for.
"""

import copy
import time

import torch
from torch import Tensor, nn

import vtc
from vtc_zoo import digits, load, load_folder
from vtc_zoo.train_dit_digits import Plan, fit, options, planned, report, save

RATE = 1e-3

FULL = Plan(steps=2000, batch=64, warmup=50, drawn=1000)
SMOKE = Plan(steps=20, batch=16, warmup=5, drawn=50)

EXAMPLES = """examples:
  python -m vtc_zoo.train_flexdit_digits --out work/flexdit           # ten minutes
  python -m vtc_zoo.train_flexdit_digits --out work/flexdit --smoke   # to see that it runs"""


def train(plan: Plan, seed: int) -> tuple[nn.Module, nn.Module]:
    """The running averages of the model and of the new weights."""
    model, _ = load("tiny-dit-digits")
    averages = [copy.deepcopy(model)]
    with vtc.attach(model.train(), **digits.FLEXDIT) as session:
        new = session.modules["dit.0"]
        averages.append(copy.deepcopy(new))
        average = nn.ModuleList(averages).requires_grad_(False)

        def times(batch: int, generator: torch.Generator) -> Tensor:
            drawn = session.methods[0].schedule.draw(batch, generator)
            return (drawn + torch.rand(batch, generator=generator)) / digits.TIME_SCALE

        fit(nn.ModuleList([model, new]), average, model, plan, seed, times, RATE)
    return average[0].eval(), average[1]


def main() -> None:
    parser = options("Fine-tune tiny-dit-digits for few tokens.", EXAMPLES)
    args, plan = planned(parser, FULL, SMOKE)

    began, began_cpu = time.monotonic(), time.process_time()
    model, new = train(plan, args.seed)
    minutes = [(time.monotonic() - began) / 60, (time.process_time() - began_cpu) / 60]
    save(model, args.out)
    new.half().save(args.out / digits.FLEXDIT_WEIGHTS)

    stored, _ = load_folder(args.out)  # what is stored is what is measured
    with vtc.attach(stored, **digits.FLEXDIT, weights=args.out / digits.FLEXDIT_WEIGHTS):
        report(stored, plan, args.seed, minutes, args.out)


if __name__ == "__main__":
    main()

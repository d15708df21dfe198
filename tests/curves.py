"""Draw the curves of runs: loss terms, W_dt and accuracies (of the first of data.eval_splits).

python tests/curves.py runs/toys runs/other --save curves.png    # first: pip install matplotlib
"""

import argparse
import json
import math
from pathlib import Path

import matplotlib.pyplot as plt

LABELS = {"decoder": "loss, decoder", "token_on_truth": "loss, token on truth"}
LABELS |= {"token_on_teacher": "loss, token on teacher", "teacher_weight": "W_dt"}
LABELS |= {"decoder_acc": "decoder, Acc@0.5", "token_acc": "token, Acc@0.5"}
LABELS |= {"decoder_f1": "decoder, F1=1", "token_f1": "token, F1=1"}
LABELS |= {"decoder_nacc": "decoder, N-acc", "token_nacc": "token, N-acc"}

parser = argparse.ArgumentParser(description="Draw the curves of runs, a panel for each quantity.")
parser.add_argument("runs", nargs="+", metavar="RUN", help="the folder of a run")
parser.add_argument("--save", default="curves.png", metavar="FILE", help="(default: curves.png)")
args = parser.parse_args()
rows_of = {}
found = set()
for run in args.runs:
    rows = map(json.loads, Path(run, "metrics.jsonl").read_text().splitlines())
    rows_of[run] = [row for row in rows if row.get("weights") != "best"]
    found = found.union(*rows_of[run])
names = [name for name in LABELS if name in found]
figure = plt.figure(figsize=(12, 4 * math.ceil(len(names) / 3)), layout="constrained")
for number, name in enumerate(names, 1):
    panel = figure.add_subplot(math.ceil(len(names) / 3), 3, number, xlabel="step")
    for run, rows in rows_of.items():
        having = [row for row in rows if name in row]
        steps = [row["step"] for row in having]
        values = [row[name] for row in having]
        panel.plot(steps, values, marker=".", label=run)  # empty curves keep colours and legend
    panel.set_ylabel(LABELS[name])
figure.legend(*panel.get_legend_handles_labels(), loc="outside upper left")
figure.savefig(args.save)

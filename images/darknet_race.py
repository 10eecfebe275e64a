"""Draws darknet_race.png from darknet_race.csv, both next to this script: the loss of a whole training run in Darknet
and in train.py.

The table was measured on Darknet b61bcf54 (January 2017, with the batch norm and the region layer's gradient of its GPU
build) and on train.py: total loss per step of the same narrow detector (a quarter of the channels) from the same
weights, 64 VOC photographs at 128 px, 640 steps. Columns: three seeds of Darknet, three of ours, and ours fed with the
images of Darknet's seeds 1 and 2.
"""

from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt

TABLE = Path(__file__).with_name("darknet_race.csv")
WINDOW = 16  # steps of a moving mean: single steps vary too much to be seen side by side
BLUE, AMBER, GREY = "#1f5fa8", "#b06a00", "#667080"


def smooth(losses: np.ndarray) -> np.ndarray:
    """Moving means over WINDOW steps."""
    return np.convolve(losses, np.ones(WINDOW) / WINDOW, mode="valid")


def main() -> None:
    table = np.genfromtxt(TABLE, delimiter=",", names=True)
    steps = table["step"][WINDOW - 1 :]
    figure = plt.figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplot_mosaic([["own", "same"], ["own", "ratio"]], height_ratios=[2, 1])
    own, same, ratio = axes["own"], axes["same"], axes["ratio"]

    for number in range(3):
        label = {"label": "Darknet, 3 seeds"} if number == 0 else {}
        own.plot(steps, smooth(table[f"darknet_{number + 1}"]), color=GREY, linewidth=1, **label)
        label = {"label": "train.py, 3 seeds"} if number == 0 else {}
        own.plot(steps, smooth(table[f"ours_{number}"]), color=BLUE, linewidth=1, **label)
    own.set_title("each with its own loader and images", fontsize=11)

    darknet, ours = table["darknet_1"], table["ours_on_darknet_images_1"]
    same.plot(steps, smooth(darknet), color=GREY, linewidth=4, alpha=0.5, label="Darknet, seed 1")
    same.plot(steps, smooth(ours), color=AMBER, linewidth=1, label="train.py on the same images")
    same.set_title("on the same images", fontsize=11)
    ratio.plot(steps, smooth(ours) / smooth(darknet), color=AMBER, linewidth=1)
    ratio.axhline(1, color=GREY, linewidth=1)
    ratio.set(ylim=(0.97, 1.03), ylabel="ratio", xlabel="step")

    for axis in (own, same):
        axis.set(ylim=(2.8, 5.8), ylabel=f"loss, mean of {WINDOW} steps")
        axis.legend(fontsize=9)
    own.set_xlabel("step")
    for axis in axes.values():
        axis.grid(alpha=0.3)
        axis.set_xlim(0, table["step"][-1])
    figure.savefig(TABLE.with_suffix(".png"), dpi=100)


if __name__ == "__main__":
    main()

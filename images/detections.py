"""Puts the drawings of detect.py together as detections.jpg, next to this script: three per row, not stretched.

    python detect.py CHECKPOINT=... CONFIDENCE_THRESHOLD=0.25 && python images/detections.py

For the committed picture, CHECKPOINT is the detector of tests/MEASUREMENTS.md, A detector on 3,400 photographs.
"""

from pathlib import Path

from PIL import Image

DRAWINGS = Path("runs/detections")
WIDTH, GAP = 1200, 8  # pixels


def main() -> None:
    pictures = [Image.open(file) for file in sorted(DRAWINGS.glob("*.jpg"))]
    rows, height = [], GAP
    for first in range(0, len(pictures), 3):
        row = pictures[first : first + 3]
        # one height for the row, at which its pictures and gaps fill the width
        row_height = round((WIDTH - GAP * (len(row) + 1)) / sum(picture.width / picture.height for picture in row))
        rows.append([picture.resize((picture.width * row_height // picture.height, row_height)) for picture in row])
        height += row_height + GAP
    sheet, y = Image.new("RGB", (WIDTH, height), "white"), GAP
    for row in rows:
        x = GAP
        for picture in row:
            sheet.paste(picture, (x, y))
            x += picture.width + GAP
        y += row[0].height + GAP
    sheet.save(Path(__file__).with_suffix(".jpg"), quality=88)


if __name__ == "__main__":
    main()

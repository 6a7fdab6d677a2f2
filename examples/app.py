"""An application around the runtime: progress, previews on disk, a clean stop.

    python examples/app.py BUNDLE OUT.png [--steps 20]

OUT.preview.png shows the state every few steps and becomes OUT.png at the end; Ctrl-C leaves the last one.
BUNDLE is a folder that `elit-export build` wrote, of a model of pixels, or of VAE latents with a decoder.
"""

import argparse
import sys
from contextlib import closing
from pathlib import Path

from elit_export import ElitExportError, Pipeline
from elit_export.runtime.images import grid, zoom_of

IMAGES = 4
PREVIEW_EVERY = 5


def paint(bundle: Path, out: Path, steps: int) -> None:
    preview, partial = out.with_suffix(".preview.png"), out.with_suffix(".partial.png")
    with Pipeline.load(bundle) as pipeline:
        labels = range(min(IMAGES, pipeline.spec.num_classes))
        records = pipeline.steps(labels, steps=steps, schedule="0.0-0.5:full,0.5-1.0:quarter")
        try:
            with closing(records):  # on Ctrl-C too
                for done, record in enumerate(records, start=1):
                    say(f"step {done} of {steps} at budget {record.budget}")
                    if done % PREVIEW_EVERY == 0 or done == steps:
                        grid([images := pipeline.decode(record.x)], zoom=zoom_of(images, 4)).save(partial)
                        partial.replace(preview)  # whole or not at all
        finally:
            partial.unlink(missing_ok=True)
    preview.replace(out)


def say(text: str) -> None:
    sys.stderr.write(text + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description="Sample a bundle into a picture.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=20)
    try:
        paint(**vars(parser.parse_args()))
    except (ElitExportError, OSError) as error:  # the second: OUT cannot be written, BUNDLE not be read
        say(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        say("stopped")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

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
        options = {"steps": steps, "schedule": "0%-50%:quarter,50%-100%:full"}
        request = pipeline.request(labels, **options)
        state, records = request.start.copy(), pipeline.steps(labels, **options)
        try:
            with closing(records):  # on Ctrl-C too
                for done, record in enumerate(records, start=1):
                    state[record.images] = record.x  # more images than an engine call takes come in parts
                    sys.stderr.write(f"step {done} of {request.records} at budget {record.budget}\n")
                    if done % PREVIEW_EVERY == 0 or done == request.records:
                        grid([images := pipeline.decode(state)], zoom=zoom_of(images, 4)).save(partial)
                        partial.replace(preview)  # whole or not at all
        finally:
            partial.unlink(missing_ok=True)
    preview.replace(out)


def main() -> int:
    parser = argparse.ArgumentParser(description="Sample a bundle into a picture.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=20)
    try:
        paint(**vars(parser.parse_args()))
    except (ElitExportError, OSError) as error:  # the second: OUT cannot be written, BUNDLE not be read
        sys.stderr.write(f"error: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("stopped\n")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

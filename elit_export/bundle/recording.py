"""What commands measure on a bundle's engines and find by it, written into its manifest."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from elit_export.bundle.manifest import Manifest
from elit_export.bundle.presets import Preset
from elit_export.bundle.reading import Bundle
from elit_export.bundle.store import writing
from elit_export.errors import BundleError


def record(bundle: Bundle, checkpoint_sha256: str, change: Callable[[Manifest], Manifest], *, remedy: str) -> Bundle:
    """Write the changed manifest of a bundle, whole or not at all.

    `change` gets the manifest as it is now: a target may have been built meanwhile. Raises BundleError if the bundle is
    of another checkpoint than what was measured, or cannot be written.
    """
    with writing(bundle.folder) as store:
        manifest = store.manifest
        if manifest is None or manifest.model.other_checkpoint(checkpoint_sha256):
            raise BundleError(f"{bundle.folder} was built from another checkpoint meanwhile", remedy)
        return store.commit(change(manifest))


def record_presets(bundle: Bundle, presets: Sequence[Preset]) -> Bundle:
    """Write presets into the manifest, in place of those of the same names; raises BundleError.

    They are of one checkpoint and have different names, and there is at least one.
    """
    added = {preset.name: preset for preset in presets}
    checkpoint_sha256, *others = {preset.checkpoint_sha256 for preset in presets}
    assert not others
    assert len(added) == len(presets)

    def with_added(manifest: Manifest) -> Manifest:
        kept = {preset.name: preset for preset in manifest.presets}
        return manifest.model_copy(update={"presets": tuple((kept | added).values())})

    return record(bundle, checkpoint_sha256, with_added, remedy="make the presets again")

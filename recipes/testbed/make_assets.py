"""Makes the testbed's data assets from Fashion-MNIST: the classifier, the 10 % subset, the reference, and their cards.

    python recipes/testbed/make_assets.py --out src/grafting/assets/testbed

Reads the idx files of Debian's package dataset-fashion-mnist (or `--data FOLDER`). One thread, no accelerator, about
ten minutes. Everything is drawn from SEED, so a second run on a like machine gives the same files. `--only STEP`
does one step again; the reference needs the classifier. The pretrained DiT beside them has its own recipe, pretrain.yaml;
`--only checksums` takes it into the list that the package checks at load time.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from grafting.data import ImageSet
from grafting.data.bundled import CLASSIFIER_NAME, REFERENCE_NAME
from grafting.data.images import FASHION_MNIST_CLASSES, FASHION_MNIST_FOLDER, read_fashion_mnist
from grafting.data.subset import Subset, stratified_subset, write_subset
from grafting.evaluation import Reference
from grafting.machine.files import atomic_path, sha256_of, write_bytes, write_json
from grafting.machine.randomness import batch_indices, generator
from grafting.metrics.features import ModuleNetwork, extract
from grafting.metrics.frechet import FeatureStatistics, frechet_distance
from grafting.metrics.kid import kernel_distance
from grafting.metrics.manifold import density_coverage, precision_recall
from grafting.models.classifier import Classifier, load_classifier, save_classifier

SEED = 0
EPOCHS = 18
BATCH_SIZE = 256
PEAK_LR = 0.2
WEIGHT_DECAY = 5e-4
LABEL_SMOOTHING = 0.1
MAX_SHIFT = 2  # pixels, the border of zeros around a 28x28 image in 32x32

SUBSET_PER_CLASS = 600
REFERENCE_PER_CLASS = 500

COMMAND = "python recipes/testbed/make_assets.py --out src/grafting/assets/testbed"
SOURCE = """\
- **Data:** Fashion-MNIST (arXiv:1708.07747), https://github.com/zalandoresearch/fashion-mnist, as packaged by Debian in
  `dataset-fashion-mnist`: 60,000 training and 10,000 test images, 28x28 grey, 10 classes
- **Licence of the data:** MIT, copyright 2017 Zalando SE, https://tech.zalando.com"""


@dataclass(frozen=True)
class Workshop:
    """Where the assets go and what they are made of."""

    out: Path
    train: ImageSet
    test: ImageSet


def main() -> None:
    options = parse_options()
    torch.set_num_threads(1)
    shop = Workshop(
        options.out, read_fashion_mnist(options.data), read_fashion_mnist(options.data, train=False)
    )
    for step in dict.fromkeys([*(options.only or STEPS), "checksums"]):
        print(step, flush=True)
        STEPS[step](shop)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("src/grafting/assets/testbed"), metavar="FOLDER")
    parser.add_argument("--data", type=Path, default=FASHION_MNIST_FOLDER, metavar="FOLDER")
    parser.add_argument("--only", action="append", choices=list(STEPS), help="may be given more than once")
    return parser.parse_args()


def make_classifier(shop: Workshop) -> None:
    started = time.monotonic()
    model = train_classifier(shop.train)
    minutes = (time.monotonic() - started) / 60
    path = shop.out / "classifier.safetensors"
    save_classifier(path, model)
    write_card(path, classifier_card(path, shop, minutes=minutes))


def make_subset(shop: Workshop) -> None:
    indices = stratified_subset(shop.train.labels, per_class=SUBSET_PER_CLASS, seed=SEED)
    images = shop.train.take(indices)
    subset = Subset(source="fashion-mnist train", num_classes=10, ids=tuple(indices.tolist()))
    write_subset(shop.out / "subset.json", subset)
    path = shop.out / "subset.npz"
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(
            file, images=images.images[:, 0].numpy(), labels=images.labels.numpy().astype(np.uint8)
        )
    write_card(path, subset_card(path, images, subset))


def make_reference(shop: Workshop) -> None:
    network = ModuleNetwork(load_classifier(shop.out / "classifier.safetensors"), name=CLASSIFIER_NAME)
    reference = Reference.build(pixel_batches(shop.train), network, name=REFERENCE_NAME)
    kept = stratified_subset(shop.train.labels, per_class=REFERENCE_PER_CLASS, seed=SEED)
    reference = replace(reference, features=features_of(network, shop.train.take(kept)).half())
    path = shop.out / "reference.safetensors"
    reference.save(path)
    write_card(path, reference_card(path, reference, network, shop))


def make_checksums(shop: Workshop) -> None:
    """List the hash of every file that the package loads, cards excepted."""
    files = sorted(p for p in shop.out.rglob("*") if p.suffix in {".safetensors", ".npz", ".json"})
    listed = {p.relative_to(shop.out).as_posix(): sha256_of(p) for p in files if p.name != "checksums.json"}
    write_json(shop.out / "checksums.json", listed)


STEPS: dict[str, Callable[[Workshop], None]] = {
    "classifier": make_classifier,
    "subset": make_subset,
    "reference": make_reference,
    "checksums": make_checksums,
}


def train_classifier(data: ImageSet) -> Classifier:
    """Train in bfloat16 with SGD and one cycle of the learning rate, on flipped and shifted images."""
    torch.manual_seed(SEED)
    model = Classifier().to(memory_format=torch.channels_last).train()
    num_steps = EPOCHS * len(data) // BATCH_SIZE
    optimizer = torch.optim.SGD(
        model.parameters(), lr=PEAK_LR, momentum=0.9, nesterov=True, weight_decay=WEIGHT_DECAY
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LR, total_steps=num_steps, pct_start=0.2)
    for step in range(num_steps):
        indices = batch_indices(len(data), BATCH_SIZE, step, SEED)
        images = augment(data.pixels(indices), draw=generator(SEED, step))
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(images).logits
        loss = F.cross_entropy(logits.float(), data.labels[indices], label_smoothing=LABEL_SMOOTHING)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"  step {step} of {num_steps}, loss {loss:.3f}", flush=True)
    return model.eval()


def augment(images: Tensor, *, draw: torch.Generator) -> Tensor:
    """Images [B, C, H, W], each shifted by up to MAX_SHIFT pixels and mirrored with probability 1/2.

    The shift wraps around, which moves nothing but zeros: that is what the border holds.
    """
    num_images, _, height, width = images.shape
    shifts = torch.randint(-MAX_SHIFT, MAX_SHIFT + 1, (2, num_images, 1), generator=draw)
    rows = (torch.arange(height) - shifts[0]) % height  # [B, H]
    cols = (torch.arange(width) - shifts[1]) % width  # [B, W]
    mirrored = torch.rand(num_images, 1, generator=draw) < 0.5
    cols = torch.where(mirrored, width - 1 - cols, cols)
    each = torch.arange(num_images)[:, None, None]
    return images[each, :, rows[:, :, None], cols[:, None, :]].movedim(-1, 1)


def pixel_batches(data: ImageSet) -> list[Tensor]:
    """All images as the metrics take them, 500 at a time."""
    return [data.pixels(indices) for indices in torch.arange(len(data)).split(500)]


def features_of(network: ModuleNetwork, data: ImageSet) -> Tensor:
    return torch.cat([extract(network, batch).pooled for batch in pixel_batches(data)])


def accuracy_by_class(model: Classifier, data: ImageSet) -> Tensor:
    """Share of correct predictions for each class, [10]."""
    with torch.no_grad():
        predicted = torch.cat([model(batch).logits.argmax(1) for batch in pixel_batches(data)])
    return torch.stack([(predicted == c)[data.labels == c].double().mean() for c in range(data.num_classes)])


def write_card(asset: Path, text: str) -> None:
    write_bytes(asset.with_suffix(".md"), text.encode())


def facts(path: Path) -> str:
    return f"`{path.name}`, {path.stat().st_size:,} bytes, sha256 `{sha256_of(path)}`"


def classifier_card(path: Path, shop: Workshop, *, minutes: float) -> str:
    model = load_classifier(path)
    by_class = accuracy_by_class(model, shop.test)
    rows = "\n".join(
        f"| {name} | {share:.1%} |"
        for name, share in zip(FASHION_MNIST_CLASSES, by_class.tolist(), strict=True)
    )
    return f"""\
# {CLASSIFIER_NAME}: the feature network of the testbed

A small pre-activation residual network (`grafting.models.classifier.Classifier`) that was trained to tell the classes
of Fashion-MNIST apart. Frechet distance, kernel distance, precision, recall, density and coverage are measured in
its {model.config["feature_dim"]} pooled features; class agreement is by its logits. These figures are not FID and compare with none
made by another network. It was trained on mirrored images, so it hardly sees whether a sample is mirrored.

- **File:** {facts(path)}; float16, computed in float32
- **Parameters:** {sum(p.numel() for p in model.parameters()):,}
- **Input:** 8-bit images [B, 1, 32, 32]: 28x28 with two pixels of zeros around
- **Test accuracy, with the stored weights:** {by_class.mean():.2%} of 10,000
{SOURCE}
- **Licence of the weights:** that of this package, Apache-2.0
- **Made by:** `{COMMAND}`
- **Training:** all 60,000 training images, no image held out; {EPOCHS} epochs, batch {BATCH_SIZE}, seed {SEED}; SGD with Nesterov momentum 0.9,
  one cycle up to learning rate {PEAK_LR}, weight decay {WEIGHT_DECAY}, label smoothing {LABEL_SMOOTHING}; shifts of up to {MAX_SHIFT} pixels and
  mirroring; bfloat16 autocast; {minutes:.1f} minutes on one CPU thread with PyTorch {torch.__version__}

| class | accuracy |
|---|---|
{rows}
"""


def subset_card(path: Path, images: ImageSet, subset: Subset) -> str:
    index = path.with_suffix(".json")
    return f"""\
# The 10 % subset of Fashion-MNIST's training set

{SUBSET_PER_CLASS} images of each class, {len(images):,} in all, drawn at random once: the data of stage 1 and stage 2 in the testbed.

- **Images and labels:** {facts(path)}; `images` [{len(images)}, 28, 28] and `labels` [{len(images)}], 8-bit, deflated
- **Hash of the content** (`ImageSet.sha256`): `{images.sha256()}`
- **Which images:** {facts(index)}; positions in the training files, counted from 0, in the order of the images
- **Hash of the sorted positions** (`subset_sha256`): `{subset.sha256}`
{SOURCE}
- **Made by:** `{COMMAND}`, seed {SEED}
"""


def reference_card(path: Path, reference: Reference, network: ModuleNetwork, shop: Workshop) -> str:
    rows = "\n".join(f"| {name} | {figures} |" for name, figures in calibration(reference, network, shop))
    return f"""\
# {REFERENCE_NAME}: the reference statistics of the testbed

Features of all {reference.statistics.count:,} training images of Fashion-MNIST by {CLASSIFIER_NAME}: count, mean and scatter in float64 for the
Frechet distance, and {len(reference.features):,} rows ({REFERENCE_PER_CLASS} a class, float16) for the metrics that need rows.

- **File:** {facts(path)}
- **Hash of the reference** (`Reference.sha256`, part of every protocol): `{reference.sha256}`
- **Hash of the feature network:** `{network.sha256}`
{SOURCE}
- **Made by:** `{COMMAND}`, seed {SEED}

What the figures of known images are, so that a sample's can be read. "Even" draws have the same number of each class,
as sampling with labels in turn has; test images are the best that a model could give without having seen them.

| images | Frechet | kernel distance | precision | recall | density | coverage |
|---|---|---|---|---|---|---|
{rows}

The classifier was never shown noise, and puts nearly all uniform noise on one spot among the features of real images: precision
alone does not see it, recall and the distances do.
"""


def calibration(reference: Reference, network: ModuleNetwork, shop: Workshop) -> list[tuple[str, str]]:
    """Names of known sets of images, and their figures against the reference as cells of a table."""
    features = features_of(network, shop.test)
    even = stratified_subset(shop.test.labels, per_class=200, seed=SEED)
    clean = shop.test.take(even)
    known = {
        "all 10,000 test images": features,
        **{f"2,000 test images at random, draw {i + 1}": features[random_rows(i)] for i in range(3)},
        "2,000 test images, even": features[even],
    }
    damaged = {
        "those 2,000 with Gaussian noise of 8 levels": add_noise(clean.images, levels=8),
        "those 2,000 with Gaussian noise of 32 levels": add_noise(clean.images, levels=32),
        "those 2,000 blurred 3x3": blur(clean.images),
        "2,000 of uniform noise": torch.randint(0, 256, clean.images.shape, generator=generator(SEED)).byte(),
    }
    known |= {name: features_of(network, replace(clean, images=images)) for name, images in damaged.items()}
    known["test images without the last class"] = features[shop.test.labels < 9]
    return [(name, " | ".join(figures(rows, reference))) for name, rows in known.items()]


def figures(rows: Tensor, reference: Reference) -> list[str]:
    real = reference.features.float()
    fidelity, spread = precision_recall(real, rows, k=3), density_coverage(real, rows, k=5)
    return [
        f"{frechet_distance(FeatureStatistics.of(rows), reference.statistics):.4f}",
        f"{kernel_distance(real, rows).value:.5f}",
        *(f"{value:.3f}" for value in (*fidelity, *spread)),
    ]


def random_rows(draw: int) -> Tensor:
    return torch.randperm(10_000, generator=generator(SEED, draw))[:2000]


def add_noise(images: Tensor, *, levels: float) -> Tensor:
    noise = torch.randn(images.shape, generator=generator(SEED))
    return (images + levels * noise).round().clamp(0, 255).byte()


def blur(images: Tensor) -> Tensor:
    return F.avg_pool2d(images.float(), 3, stride=1, padding=1).round().byte()


if __name__ == "__main__":
    main()

"""Published data sets of masks, in tiny copies of their folders: ids become 0..K-1 and 255, errors name the file."""

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_flows.codecs import IGNORE
from lightning_flows.data import ADE20K, CelebAMaskHQ, Cityscapes, COCOStuff, MaskFolder
from lightning_flows.data.mask_ids import MaskIds
from lightning_flows.data.mask_layouts import COCO_GAPS
from lightning_flows.store import build


def save(path, pixels, mode=None, palette=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = (
        Image.fromarray(np.asarray(pixels, np.uint8), mode) if mode else Image.fromarray(np.asarray(pixels, np.uint8))
    )
    if palette:
        picture.putpalette(palette)
    picture.save(path)


def photo(path, height=4, width=4, value=100):
    save(path, np.full((height, width, 3), value))


def coco(root, ids, split="train", name="000000000009"):
    ids = np.asarray(ids)
    photo(root / f"images/{split}2017/{name}.jpg", *ids.shape)
    save(root / f"stuffthingmaps/{split}2017/{name}.png", ids)


def ade(root, ids, split="training", name="ADE_train_00000001"):
    ids = np.asarray(ids)
    photo(root / f"images/{split}/{name}.jpg", *ids.shape)
    save(root / f"annotations/{split}/{name}.png", ids)


def city(root, ids, split="train", name="aachen_000000_000019", kind="labelIds"):
    ids = np.asarray(ids)
    photo(root / f"leftImg8bit/{split}/aachen/{name}_leftImg8bit.png", *ids.shape)
    save(root / f"gtFine/{split}/aachen/{name}_gtFine_{kind}.png", ids)
    save(root / f"gtFine/{split}/aachen/{name}_gtFine_color.png", np.zeros((*ids.shape, 4)))


def face(root, number, parts, side=4):
    photo(root / f"CelebA-HQ-img/{number}.jpg", 2 * side, 2 * side)
    for name, covered in parts.items():
        save(root / f"CelebAMask-HQ-mask-anno/{number // 2000}/{number:05d}_{name}.png", np.asarray(covered) * 255)


def test_coco_ids_close_their_gaps(tmp_path):
    stored = [number - 1 for number in range(1, 183) if number not in COCO_GAPS]
    coco(tmp_path, np.array([*stored, 255]).reshape(4, 43))
    coco(tmp_path, [[91, 181], [0, 255]], split="val")
    data = COCOStuff(str(tmp_path), batch_size=1)
    assert data.dataset("train")[0]["mask"].flatten().tolist() == [*range(171), IGNORE]
    assert data.dataset("val")[0]["mask"].tolist() == [[80, 170], [0, IGNORE]]
    assert (data.num_classes, len(set(data.classes))) == (171, 171)
    assert [data.classes[i] for i in (0, 11, 79, 80, 170)] == ["person", "stop sign", "toothbrush", "banner", "wood"]
    assert len(data.test_dataloader()) == 1  # the masks of the test are not public: validation


@pytest.mark.parametrize("gap", [11, 90, 182])
def test_an_id_in_a_gap_of_coco_names_the_file(tmp_path, gap):
    coco(tmp_path, [[0, gap]])
    with pytest.raises(ValueError, match=rf"stuffthingmaps/train2017/000000000009\.png holds id {gap}, .* not in ids"):
        COCOStuff(str(tmp_path)).dataset("train")[0]


def test_ade_ids_begin_at_one(tmp_path):
    ade(tmp_path, [[0, 1], [2, 150]])
    data = ADE20K(str(tmp_path))
    assert data.dataset("train")[0]["mask"].tolist() == [[IGNORE, 0], [1, 149]]
    assert (data.num_classes, data.classes[0], data.classes[149]) == (150, "wall", "flag")
    assert not data.has("val")
    ade(tmp_path, [[151]])
    with pytest.raises(ValueError, match=r"ADE_train_00000001\.png holds id 151"):
        ADE20K(str(tmp_path)).dataset("train")[0]


def test_cityscapes_ids_become_train_ids(tmp_path):
    city(tmp_path, np.arange(34).reshape(2, 17))
    data = Cityscapes(str(tmp_path))
    mask = data.dataset("train")[0]["mask"].flatten()
    kept = {7: "road", 8: "sidewalk", 11: "building", 21: "vegetation", 24: "person", 26: "car", 33: "bicycle"}
    assert {i: data.classes[mask[i]] for i in kept} == kept
    assert sorted(mask[mask != IGNORE].tolist()) == list(range(19))
    assert mask[[0, 3, 6, 9, 14, 29, 30]].unique().tolist() == [IGNORE]
    city(tmp_path, [[34]])
    with pytest.raises(ValueError, match=r"aachen_000000_000019_gtFine_labelIds\.png holds id 34"):
        Cityscapes(str(tmp_path)).dataset("train")[0]


def test_cityscapes_train_ids_stay(tmp_path):
    city(tmp_path, [[0, 18], [255, 7]], kind="labelTrainIds")
    assert Cityscapes(str(tmp_path), stored="train_ids").dataset("train")[0]["mask"].tolist() == [[0, 18], [255, 7]]
    with pytest.raises(FileNotFoundError, match=r"aachen_000000_000019_gtFine_labelIds\.\* does not exist"):
        Cityscapes(str(tmp_path)).setup("fit")
    with pytest.raises(ValueError, match="stored must be 'ids' or 'train_ids'"):
        Cityscapes(str(tmp_path), stored="colours")


SKIN = [[0, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 1], [0, 1, 1, 0]]
HAIR = [[1, 1, 1, 1], [1, 0, 0, 1], [0, 0, 0, 0], [0, 0, 0, 0]]
NOSE = [[0, 0, 0, 0], [0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]]
MERGED = [[13, 13, 13, 13], [13, 1, 1, 13], [1, 2, 1, 1], [0, 1, 1, 0]]


def test_parts_of_a_face_are_painted_in_the_authors_order(tmp_path):
    face(tmp_path, 2001, {"hair": HAIR, "nose": NOSE, "skin": SKIN})
    face(tmp_path, 7, {"skin": SKIN})
    data = CelebAMaskHQ(str(tmp_path), size=4)
    assert data.dataset("train")[1]["mask"].tolist() == MERGED  # 7 comes before 2001
    assert data.dataset("train")[0]["mask"].tolist() == SKIN
    assert data.dataset("train")[0]["image"].shape == (3, 4, 4)
    assert (data.num_classes, data.classes[13], data.classes[18]) == (19, "hair", "cloth")


def test_merged_faces_are_read_as_they_are(tmp_path):
    face(tmp_path, 3, {})
    save(tmp_path / "labels/3.png", MERGED)
    data = CelebAMaskHQ(str(tmp_path), merged="labels", size=4)
    assert data.dataset("train")[0]["mask"].tolist() == MERGED
    save(tmp_path / "labels/3.png", np.full((4, 4), 19))
    with pytest.raises(ValueError, match=r"labels/3\.png holds class id 19, but there are 19 classes"):
        data.dataset("train")[0]


def test_faces_are_divided_as_celeba_divides_them(tmp_path):
    rows = [(0, 162_770), (1, 162_771), (2, 182_637), (3, 182_638), (4, 0)]
    for number, _ in rows:
        face(tmp_path, number, {"skin": SKIN})
    mapping = tmp_path / "CelebA-HQ-to-CelebA-mapping.txt"
    with pytest.raises(FileNotFoundError, match=r"mapping\.txt does not exist, but partition='celeba'"):
        CelebAMaskHQ(str(tmp_path), partition="celeba").setup("fit")
    mapping.write_text("idx orig_idx orig_file\n" + "".join(f"{i}  {o}  {o + 1:06d}.jpg\n" for i, o in rows))
    data = CelebAMaskHQ(str(tmp_path), partition="celeba", size=4)
    names = {s: [int(p.stem) for p in data.read(s).images.files] for s in ("train", "val", "test")}
    assert names == {"train": [0, 4], "val": [1, 2], "test": [3]}
    mapping.write_text("idx orig_idx orig_file\n0 zero\n")
    with pytest.raises(ValueError, match=r"mapping\.txt:2 must begin with two numbers"):
        CelebAMaskHQ(str(tmp_path), partition="celeba").setup("fit")
    mapping.write_text("idx orig_idx orig_file\n0 5\n")
    with pytest.raises(ValueError, match=r"image .*1\.jpg is not in .*mapping\.txt"):
        CelebAMaskHQ(str(tmp_path), partition="celeba").setup("fit")


@pytest.mark.parametrize(
    ("spoil", "kind", "error"),
    [
        (lambda r: face(r, 1, {}), FileNotFoundError, r"mask-anno/0/00001_\*\.png does not exist \(1 images without\)"),
        (lambda r: face(r, 0, {"beard": SKIN}), ValueError, r"00000_beard\.png is of no known part"),
        (lambda r: face(r, 0, {"nose": [[1]]}), ValueError, r"00000_nose\.png and the other parts differ in size"),
        (lambda r: photo(r / "CelebA-HQ-img/0.jpg", 8, 6), ValueError, r"00000 and image .*0\.jpg differ in shape"),
        (lambda r: photo(r / "CelebA-HQ-img/a.jpg"), ValueError, r"a\.jpg must have a number for its name"),
        (lambda r: (r / "CelebA-HQ-img/0.jpg").unlink(), FileNotFoundError, r"CelebA-HQ-img holds no images"),
    ],
)
def test_what_is_wrong_with_a_face_is_named(tmp_path, spoil, kind, error):
    face(tmp_path, 0, {"skin": SKIN})
    spoil(tmp_path)
    with pytest.raises(kind, match=error):
        CelebAMaskHQ(str(tmp_path), size=4).dataset("train")[0]


def test_arguments_of_the_faces_are_checked(tmp_path):
    with pytest.raises(ValueError, match="size is needed"):
        CelebAMaskHQ(str(tmp_path), size=None)
    with pytest.raises(ValueError, match="partition must be"):
        CelebAMaskHQ(str(tmp_path), partition="half")


LAYOUTS = [
    (COCOStuff, coco, "stuffthingmaps/train2017"),
    (ADE20K, ade, "annotations/training"),
    (Cityscapes, city, "gtFine/train"),
]


@pytest.mark.parametrize(("layout", "make", "masks"), LAYOUTS)
def test_what_is_missing_or_does_not_fit_is_named(tmp_path, layout, make, masks):
    with pytest.raises(FileNotFoundError, match=r"nowhere is not a folder; expected\n"):
        layout(str(tmp_path / "nowhere")).setup("fit")
    with pytest.raises(FileNotFoundError, match=r"holds no images .*; expected\n"):
        layout(str(tmp_path)).setup("fit")
    make(tmp_path, np.ones((4, 6)))
    (file,) = (p for p in (tmp_path / masks).rglob("*.png") if "color" not in p.name)
    save(file, np.ones((4, 5)))
    with pytest.raises(ValueError, match=rf"{file.name} and image .* differ in size: \(4, 5\) and \(4, 6\)"):
        layout(str(tmp_path)).dataset("train")[0]
    file.write_bytes(b"no picture")
    with pytest.raises(ValueError, match=rf"{file.name} cannot be read"):
        layout(str(tmp_path)).dataset("train")[0]
    file.unlink()
    with pytest.raises(FileNotFoundError, match=rf"{file.stem}\.\* does not exist \(1 images without\)"):
        layout(str(tmp_path)).setup("fit")


@pytest.mark.parametrize(("layout", "make", "masks"), LAYOUTS)
def test_layouts_can_be_rebuilt_from_their_config(tmp_path, layout, make, masks):
    make(tmp_path, np.full((6, 8), 8))
    data = layout(str(tmp_path), size=4, crop="random", batch_size=1)
    again = build(data.config)
    assert torch.equal(data.dataset("train")[0]["mask"], again.dataset("train")[0]["mask"])
    assert data.test_split == "val"


def ramp(root, n=6, height=8, width=16):
    """Images whose red says the class of each pixel, so that a mask that does not move along is seen."""
    rng = np.random.default_rng(0)
    for i in range(n):
        ids = np.repeat(np.repeat(rng.integers(0, 5, (height // 4, width // 4)), 4, 0), 4, 1)
        for kind, pixels in (("images", np.repeat(ids[..., None] * 50, 3, 2)), ("masks", ids)):
            save(root / "train" / kind / f"{i}.png", pixels)
            save(root / "val" / kind / f"{i}.png", pixels)


def of_image(image):
    return ((image[..., 0, :, :] + 1) * 127.5 / 50).round().long()


def test_random_crops_lie_along_the_longer_side_and_validation_takes_the_centre(tmp_path):
    ramp(tmp_path)
    data = MaskFolder(str(tmp_path), size=8, crop="random", num_classes=5, batch_size=6)
    n, crops = 6, []
    for epoch in range(20):
        item = data.dataset("train")[epoch * n]
        assert torch.equal(of_image(item["image"]), item["mask"])
        crops.append(item["mask"])
    assert len(torch.stack(crops).unique(dim=0)) > 3  # places along the longer side
    whole = MaskFolder(str(tmp_path)).dataset("val")[2]["mask"]
    for _ in range(2):
        assert torch.equal(data.dataset("val")[2]["mask"], whole[:, 4:12])
    plain, workers = (MaskFolder(str(tmp_path), size=8, crop="random", batch_size=3, num_workers=k) for k in (0, 2))
    for a, b in zip(plain.train_dataloader(), workers.train_dataloader(), strict=True):
        assert torch.equal(a["mask"], b["mask"])
        assert torch.equal(a["image"], b["image"])


def test_scaled_masks_have_no_new_ids(tmp_path):
    ids = np.zeros((9, 9), np.uint8)
    ids[:, 4:] = 200
    photo(tmp_path / "images/0.png", 9, 9)
    save(tmp_path / "masks/0.png", ids)
    data = MaskFolder(str(tmp_path), size=5, ids={"0": 0, "200": 1})
    assert data.dataset("train")[0]["mask"].unique().tolist() == [0, 1]
    assert data.num_classes == 2


def test_indices_of_a_palette_picture_are_ids(tmp_path):
    photo(tmp_path / "images/0.png", 2, 2)
    save(tmp_path / "masks/0.png", [[0, 1], [2, 255]], mode="P", palette=[9, 200, 0] * 256)
    data = MaskFolder(str(tmp_path), num_classes=3)
    assert data.dataset("train")[0]["mask"].tolist() == [[0, 1], [2, IGNORE]]


PALETTE = [(0, 0, 0), (255, 0, 0), (0, 0, 255)]


@pytest.mark.parametrize("mode", ["RGB", "P"])
def test_painted_masks_are_read_by_their_colours(tmp_path, mode):
    photo(tmp_path / "images/0.png", 1, 3)
    colours = [[[0, 0, 255], [0, 0, 0], [255, 0, 0]]]
    stored = (colours, None, None) if mode == "RGB" else ([[0, 1, 2]], "P", np.ravel(colours).tolist())
    save(tmp_path / "masks/0.png", *stored)
    data = MaskFolder(str(tmp_path), palette=PALETTE)
    assert data.dataset("train")[0]["mask"].tolist() == [[2, 0, 1]]
    assert data.num_classes == 3
    merged = MaskFolder(str(tmp_path), palette=PALETTE, ids=[255, 0, 0])
    assert merged.dataset("train")[0]["mask"].tolist() == [[0, IGNORE, 0]]
    assert build(data.config).dataset("train")[0]["mask"].tolist() == [[2, 0, 1]]


def test_an_unknown_colour_names_file_and_colour(tmp_path):
    photo(tmp_path / "images/0.png", 1, 2)
    save(tmp_path / "masks/0.png", [[[0, 0, 0], [255, 1, 0]]])
    with pytest.raises(ValueError, match=r"masks/0\.png has the colour \[255, 1, 0\], not in palette"):
        MaskFolder(str(tmp_path), palette=PALETTE).dataset("train")[0]
    with pytest.raises(ValueError, match=r"masks/0\.png must have one channel"):
        MaskFolder(str(tmp_path)).dataset("train")[0]


def test_tables_keep_255_and_refuse_what_they_lack():
    ids = np.array([[0, 7, 255]])
    assert MaskIds({"0": 1, "7": 0}).map(ids, "m").tolist() == [[1, 0, IGNORE]]
    assert MaskIds({"0": 1, "7": 0, "255": 2}).map(ids, "m").tolist() == [[1, 0, 2]]
    assert MaskIds({"0": 1, "300": 0}).map(np.array([300, 0]), "m").tolist() == [0, 1]
    for stranger in (3, 400, -1):
        with pytest.raises(ValueError, match=f"m holds id {stranger}, which is not in ids"):
            MaskIds([0, 1, 2]).map(np.array([0, stranger]), "m")


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"ids": []}, "ids must have a new id for each"),
        ({"ids": [0, 256]}, r"ids must map ids >= 0 to 0\.\.255"),
        ({"ids": {"-1": 0}}, "ids must map"),
        ({"ids": {"7": 0, "07": 1}}, "none of them twice"),
        ({"palette": [(0, 0)]}, "palette must be a list of RGB colours"),
        ({"palette": [(0, 0, 256)]}, "palette must be a list of RGB colours"),
        ({"palette": [(0, 0, 1), (0, 0, 1)]}, "palette must have each colour once"),
        ({"num_classes": 256}, r"num_classes of masks must lie in 1\.\.255"),
        ({"ids": [0], "remap_key": "of"}, "two tables for the same thing"),
    ],
)
def test_wrong_tables_are_refused_at_once(tmp_path, arguments, error):
    with pytest.raises(ValueError, match=error):
        MaskFolder(str(tmp_path), **arguments)

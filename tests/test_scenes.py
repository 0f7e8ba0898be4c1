import pytest
import torch
from scipy.ndimage import distance_transform_edt, label

import dataset
from dataset import load_dataset
from loaders import scenes
from loaders.check import check_loaded
from loaders.glyphs import draw_glyphs
from loaders.scenes import (
    LENGTH,
    PENS,
    WORDS,
    Scenes,
    all_scenes,
    distances,
    draw_scenes,
    lines_of,
    middles,
    scenes_of,
    thinned,
    write,
)
from support.captions import caption_text, parse_caption
from support.errors import NotAvailable, UserError
from support.files import save_file
from support.scene_judge import obedience, stroke_widths, take_apart


def parse(text: str) -> torch.Tensor:
    return torch.tensor(parse_caption(text, WORDS, LENGTH))


def test_captions_are_words_and_back():
    caption = parse("a thick three left of a seven")
    assert [WORDS[i] for i in caption] == ["a", "thick", "three", "left", "of", "a", "seven", "-"]
    assert caption_text(caption.tolist(), WORDS) == "a thick three left of a seven"
    assert torch.equal(parse("  A Thick\tTHREE left of\na  seven "), caption)
    for nothing in ("", "  \n"):
        assert parse_caption(nothing, WORDS, LENGTH) == [len(WORDS)] * LENGTH
    assert caption_text(parse_caption("", WORDS, LENGTH), WORDS) == ""


@pytest.mark.parametrize(
    "text, message",
    [
        ("a red three", "'red' of the caption 'a red three' is not one of a, thin, thick, left, .*, eight, nine$"),
        ("a three, left of a two", "'three,'"),
        ("-", "the word '-' of"),  # the padding is no word
        ("a " * 9, "has 9 words; give at most 8"),
    ],
)
def test_captions_that_cannot_be_understood_are_refused(text, message):
    with pytest.raises(UserError, match=message):
        parse(text)


def test_every_scene_has_its_caption_and_one_pair_in_ten_is_unseen():
    every, captions = all_scenes()
    assert captions.shape == (1800, LENGTH) and len(captions.unique(dim=0)) == 1800
    assert captions.max() == len(WORDS) - 1 and (captions[:, LENGTH - 1] > 0).any()  # the longest fills it
    again = scenes_of(captions.flip(0))
    assert all(torch.equal(part, other.flip(0)) for part, other in zip(every, again))
    asked = scenes_of(torch.stack([parse("a thick three left of a seven"), parse("a one above a thin four")]))
    assert asked.digits.tolist() == [[3, 7], [1, 4]] and asked.relation.tolist() == [0, 1]
    assert [[list(PENS)[pen] for pen in pens] for pens in asked.pens] == [["thick", ""], ["", "thin"]]
    assert asked.unseen.tolist() == [False, True] and every.unseen.float().mean() == pytest.approx(0.1)
    with pytest.raises(UserError, match="the caption 'three a above' is not that of a scene"):
        scenes_of(parse("three a above")[None])


def test_thinning_is_that_of_zhang_and_suen():
    """The figure H of their paper's first example is not at hand: a bar, a ring and what both must become."""
    bar, ring = torch.zeros(11, 21, dtype=torch.bool), torch.zeros(21, 21, dtype=torch.bool)
    bar[3:8, 2:19] = True
    y, x = torch.meshgrid(torch.arange(21) - 10, torch.arange(21) - 10, indexing="ij")
    ring[((x * x + y * y).sqrt() - 6).abs() < 2] = True
    line = thinned(bar[None])[0]
    assert line[5, 5:16].all() and line[[3, 4, 6, 7]].sum() == 0  # one row, the middle one
    circle = thinned(ring[None])[0]
    radius = (x * x + y * y)[circle].float().sqrt()
    assert radius.min() > 4.9 and radius.max() < 7.1
    assert label(~circle)[1] == label(circle, torch.ones(3, 3))[1] + 1 == 2  # closed, and in one piece


@pytest.fixture(scope="module")
def glyphs():
    """300 digits and their labels."""
    return draw_glyphs(300, seed=0)


def test_lines_are_thin_and_in_as_many_pieces_as_the_digit(glyphs):
    digits = glyphs[0][:150]
    lines, eight = lines_of(digits), torch.ones(3, 3)
    big = torch.nn.functional.interpolate(digits.float(), scale_factor=2, mode="bilinear").squeeze(1)
    whole = 0
    for line, x in zip(lines, big / big.amax((1, 2), keepdim=True)):
        assert x[line].min() > 0.2  # where the digit has ink
        whole += label(line, eight)[1] == label(x > 0.35, eight)[1]
        blocks = torch.nn.functional.avg_pool2d(line[None, None].float(), 2, 1)
        assert (blocks == 1).sum() <= 2  # hardly a square of four
    assert whole >= 0.9 * len(lines)  # a square of four pixels, apart from the rest, is known to vanish
    assert (lines.sum((1, 2)) < 0.4 * (big > 90).sum((1, 2))).float().mean() > 0.9


def test_the_loop_of_a_bold_digit_stays_open_and_a_faint_stroke_whole():
    digits = torch.zeros(2, 1, 28, 28)
    digits[0, 0, 6:22, 6:22] = 255
    digits[0, 0, 13, 13] = 80  # the hole of a bold 0, half filled
    digits[1, 0, 4:24, 8:10] = 255
    digits[1, 0, 13:15, 10:22] = 140  # a bar hardly more than half as black
    bold, faint = lines_of(digits.byte())
    assert label(~bold)[1] == 2 and faint[26:30, 26:40].any(0).all()


def test_distances_are_scipys_up_to_their_reach():
    lines = torch.rand(5, 30, 20, generator=torch.Generator().manual_seed(0)) < 0.01
    lines[:, 3, 4] = True
    exact = torch.stack([torch.from_numpy(distance_transform_edt(~line)) for line in lines.numpy()]).float()
    found = distances(lines, reach=6)
    assert torch.allclose(found[exact <= 6], exact[exact <= 6]) and found[exact > 6].min() > 6


@pytest.mark.parametrize("width", PENS.values())
def test_a_pen_writes_strokes_of_its_width_about_the_middle(width):
    """A line of 40 of the 56 pixels, which is 10 of the scene's, drawn off the middle of its picture."""
    lines = torch.zeros(1, 56, 56, dtype=torch.bool)
    lines[0, 8:48, 10] = True
    assert torch.allclose(middles(lines), torch.tensor([[10.5, 28]]) / 28 - 1)
    ink = write(lines, torch.tensor([width]), torch.tensor([[0.5, -0.1]]))[0, 0]
    assert torch.allclose(ink[8:16].sum(1), torch.tensor(width), atol=1e-3)  # of every row
    assert ink[:, :14].sum() == 0
    places = torch.arange(28) + 0.5
    middle = torch.tensor([(ink.sum(0) * places).sum(), (ink.sum(1) * places).sum()]) / ink.sum()
    assert torch.allclose(middle, torch.tensor([21.0, 12.6]), atol=0.1)
    # Turned by half a right angle it is as thick.
    lines[0] = torch.eye(56, dtype=torch.bool)
    slanted = write(lines, torch.tensor([width]), torch.zeros(1, 2))[0, 0]
    assert slanted[10:18].sum(1).mean() == pytest.approx(width * 2**0.5, rel=0.06)


@pytest.fixture(scope="module")
def drawn(glyphs):
    """500 scenes of glyphs."""
    digits, labels = glyphs
    chosen = torch.randint(1800, (500,), generator=torch.Generator().manual_seed(0))
    return digits, labels, chosen, *draw_scenes(digits, labels, chosen, seed=5)


def test_scenes_are_alike_for_a_seed(drawn):
    digits, labels, chosen, images, captions = drawn
    again = draw_scenes(digits, labels, chosen, seed=5)
    assert torch.equal(again[0], images) and torch.equal(again[1], captions)
    assert not torch.equal(draw_scenes(digits, labels, chosen, seed=6)[0], images)
    assert torch.equal(captions, all_scenes()[1][chosen])


def test_scenes_show_what_their_captions_say(drawn):
    """Each half holds one of the digits that its caption names, which is found among the ones it was drawn of."""
    digits, labels, _, images, captions = drawn
    asked = scenes_of(captions)
    relation, found = take_apart(images)
    assert torch.equal(relation, asked.relation)
    lines = lines_of(digits)
    widths = torch.tensor(list(PENS.values()))[asked.pens]
    right = 0
    for i in range(15):
        for place in (0, 1):
            drawn_so = write(lines, widths[i, place].expand(len(lines)), torch.zeros(len(lines), 2))
            _, crops = take_apart(torch.cat([images[i : i + 1], (drawn_so * 255).byte()]))
            middle = (drawn_so * 255).byte()[:, 0, 6:22, 6:22].float()
            own = found[i, place].float()
            shifts = [own.roll((y, x), (0, 1)) for y in (-1, 0, 1) for x in (-1, 0, 1)]
            gaps = torch.stack([(middle - shift).square().sum((1, 2)) for shift in shifts]).amin(0)
            right += int(labels[gaps.argmin()] == asked.digits[i, place])
    assert right >= 27


def test_scenes_are_whole_and_apart(drawn):
    images, asked = drawn[3].squeeze(1), scenes_of(drawn[4])
    border = torch.cat([images[:, 0], images[:, -1], images[:, :, 0], images[:, :, -1]], dim=1)
    assert (border.amax(1) > 127).float().mean() < 0.02
    between = torch.where(asked.relation == 0, images[:, :, 13:15].amax((1, 2)), images[:, 13:15].amax((1, 2)))
    assert (between > 127).float().mean() < 0.05


def test_widths_are_measured_back(drawn):
    images, asked = drawn[3], scenes_of(drawn[4])
    widths = stroke_widths(take_apart(images)[1].flatten(0, 1)).view(-1, 2)
    means = [widths[asked.pens == pen].mean().item() for pen in range(3)]
    # A little less than the pens' 1, 1.7 and 2.3.
    assert 0.6 < means[0] < 1.0 < 1.1 < means[1] < 1.4 < 1.6 < means[2] < 2.3
    speckled = (images + 20 * torch.rand(images.shape)).clamp(max=255).byte()  # does not count as ink
    again = stroke_widths(take_apart(speckled)[1].flatten(0, 1)).view(-1, 2)
    assert (again - widths).abs().mean() < 0.1


def test_obedience_counts_each_mistake_once():
    def of(first, second, pens=(1, 1), relation=0):
        return Scenes(torch.tensor([[first, second]]), torch.tensor([pens]), torch.tensor([relation]))

    names = ("both digits", "relation", "digits and relation", "thickness", "all")
    for asked, read, right in (
        (of(3, 7), of(3, 7), "11111"),
        (of(3, 7), of(7, 3), "10010"),
        (of(3, 7, (2, 1)), of(7, 3, (1, 2)), "10010"),  # a digit takes its thickness along
        (of(3, 7, (2, 1)), of(7, 3, (2, 1)), "10000"),
        (of(3, 7, (2, 1)), of(3, 7, (1, 2)), "11100"),
        (of(3, 7), of(3, 7, relation=1), "10010"),
        (of(3, 7), of(3, 1), "01010"),
        (of(3, 7), of(1, 2), "00010"),
        (of(3, 3, (0, 2)), of(3, 3, (2, 0)), "11100"),
    ):
        figures = obedience(asked, read)
        assert figures == {f"{name}, seen": float(value) for name, value in zip(names, right)}, (read, figures)
    both = obedience(Scenes(*map(torch.cat, zip(of(3, 6), of(3, 7)))), Scenes(*map(torch.cat, zip(of(3, 6), of(7, 3)))))
    assert both["all, unseen"] == 1 and both["all, seen"] == 0 and len(both) == 10


@pytest.fixture
def few(monkeypatch, glyphs):
    """Glyphs in the place of MNIST, a hundred scenes, and a list of the seeds drawn with."""
    seeds, digits = [], [part[:100] for part in glyphs]
    monkeypatch.setattr(scenes, "load_mnist", lambda data_dir, train: digits)

    def draw(digits, labels, chosen, seed):
        seeds.append(seed)
        return draw_scenes(digits, labels, chosen[:100], seed)

    monkeypatch.setattr(scenes, "draw_scenes", draw)
    return seeds


def test_the_dataset_has_its_words_and_the_unseen_pairs_in_its_test_part_alone(few, tmp_path):
    train, test = (load_dataset("scenes", tmp_path, train=part) for part in (True, False))
    assert train.images.shape == (100, 1, 28, 28) and train.labels.shape == (100, LENGTH)
    assert train.class_names == WORDS and train.num_classes == test.num_classes == len(WORDS) == 17
    assert train.caption_length == LENGTH
    assert not scenes_of(train.labels).unseen.any() and 0 < scenes_of(test.labels).unseen.float().mean() < 0.2
    x, y = train.draw(torch.tensor([3, 0]), torch.tensor([False, False]), torch.Generator())
    assert x.shape == (2, 1, 28, 28) and torch.equal(y, train.labels[[3, 0]])
    assert load_dataset("scenes", tmp_path, image_size=32).images.shape[2:] == (32, 32)


def test_scenes_are_kept_for_as_long_as_the_digits_and_the_code_stay(few, glyphs, tmp_path, monkeypatch, capsys):
    first = load_dataset("scenes", tmp_path)
    assert torch.equal(load_dataset("scenes", tmp_path).images, first.images) and few == [0]
    others = [part[100:200] for part in glyphs]
    monkeypatch.setattr(scenes, "load_mnist", lambda data_dir, train: others)
    assert not torch.equal(load_dataset("scenes", tmp_path).images, first.images) and few == [0, 0]
    assert "were drawn by another version" in capsys.readouterr().err
    changed = tmp_path / "scenes.py"
    changed.write_text("other code")
    monkeypatch.setattr(scenes, "__file__", str(changed))
    load_dataset("scenes", tmp_path)
    assert few == [0, 0, 0]
    (tmp_path / "scenes" / "train.pth").write_bytes(b"0")
    with pytest.raises(UserError, match="train.pth is damaged.*; delete it to have the scenes drawn anew"):
        load_dataset("scenes", tmp_path)
    save_file([first.images, first.labels[:, 0]], tmp_path / "scenes" / "train.pth")
    with pytest.raises(UserError, match="train.pth holds no scenes; delete it"):
        load_dataset("scenes", tmp_path)


def test_without_mnist_they_are_of_glyphs_and_that_is_said_aloud(few, glyphs, tmp_path, monkeypatch, capsys):
    def missing(data_dir, train):
        raise NotAvailable("MNIST is not there")

    monkeypatch.setattr(scenes, "load_mnist", missing)
    monkeypatch.setattr(scenes, "load_glyphs", lambda data_dir, train: [part[:100] for part in glyphs])
    assert len(load_dataset("scenes", tmp_path).images) == 100
    said = capsys.readouterr().err
    assert "*** MNIST is not there\n*** The scenes are made of glyphs" in said


def test_a_size_that_is_not_even_is_refused_before_anything_is_drawn(tmp_path, monkeypatch):
    monkeypatch.setitem(dataset.DATASETS, "scenes", lambda *_: pytest.fail("loaded"))
    with pytest.raises(UserError, match="image_size 29 is not even, as that of scenes must be; try 30"):
        load_dataset("scenes", tmp_path, image_size=29)


PICTURES, THEIRS = torch.zeros(3, 1, 4, 4).byte(), torch.tensor([[1, 2, 0], [3, 0, 0], [1, 1, 1]])


def test_a_loader_may_give_captions_and_need_not_use_every_word():
    images, captions, words = check_loaded((PICTURES, THEIRS.int(), ["-", "a", "b", "c", "d"]), "own", train=True)
    assert torch.equal(captions, THEIRS) and captions.dtype == torch.int64 and words == ["-", "a", "b", "c", "d"]
    assert dataset.Dataset("own", images, captions, (4, 4), tuple(words)).num_classes == 5


@pytest.mark.parametrize(
    "captions, words, message",
    [
        (THEIRS, ["-", "a", "b"], "there must be a class name for each label, 0 to 3; found 3 of them"),
        (THEIRS - 1, ["-", "a", "b", "c"], "labels must be 0, 1, 2, .*; found 5 different ones from -1 to 2|-1"),
        (THEIRS[:2], ["-", "a", "b", "c"], r"labels must be a tensor \(3,\)"),
        (THEIRS.float(), ["-", "a", "b", "c"], "labels must be a tensor"),
        (THEIRS.flip(1), ["-", "a", "b", "c"], "captions, whose padding, 0, is after their words"),
        (torch.eye(3).long(), ["cat", "dog", "emu"], "captions, whose padding"),  # one-hot labels
        (THEIRS[:, :0], ["-", "a", "b", "c"], "labels must be a tensor"),
        (THEIRS[..., None], ["-", "a", "b", "c"], "labels must be a tensor"),
    ],
)
def test_captions_that_break_the_promise_are_refused(captions, words, message):
    with pytest.raises(UserError, match=message):
        check_loaded((PICTURES, captions, words), "own", train=True)

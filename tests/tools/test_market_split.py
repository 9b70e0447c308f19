"""Held-out identities, their queries, and links instead of copies."""

import itertools

import pytest

from market_study.split import (
    DATASET_FOLDER,
    has_official_test,
    hold_out,
    make_official,
    make_split,
)

# Identity: images of each camera.
PEOPLE = {
    "0002": {1: 3, 2: 2, 5: 1},
    "0007": {1: 2, 3: 4},
    "0010": {4: 5},  # one camera: no match from another
    "0011": {2: 1, 6: 1},  # a single image in each: no query is possible
    "0012": {3: 2, 4: 2},
    "1500": {5: 2, 6: 3},
}
NAMES = [
    f"{person}_c{camera}s1_{number:06d}_01.jpg"
    for person, cameras in PEOPLE.items()
    for camera, count in cameras.items()
    for number in range(count)
]


def person_and_camera(name):
    return name[:4], int(name[6])


@pytest.fixture
def market(tmp_path):
    folder = tmp_path / "data" / DATASET_FOLDER / "bounding_box_train"
    folder.mkdir(parents=True)
    for name in NAMES:
        (folder / name).write_text(name)
    (folder / "Thumbs.db").write_text("")
    return tmp_path / "data"


@pytest.mark.parametrize("seed", range(5))
def test_each_image_is_in_one_part_and_no_identity_in_two(seed):
    split = hold_out(NAMES, num_validation=3, seed=seed)
    assert sorted(split.train + split.query + split.gallery) == sorted(NAMES)
    trained = {name[:4] for name in split.train}
    held_out = {name[:4] for name in split.query + split.gallery}
    assert len(held_out) == 3
    assert not trained & held_out


@pytest.mark.parametrize("seed", range(5))
def test_queries_are_one_per_camera_with_another_image(seed):
    split = hold_out(NAMES, num_validation=5, seed=seed)
    held_out = {name[:4] for name in split.gallery}
    expected = {
        (person, camera)
        for person in held_out
        for camera, count in PEOPLE[person].items()
        if count > 1 and len(PEOPLE[person]) > 1
    }
    assert sorted(map(person_and_camera, split.query)) == sorted(expected)
    for query in split.query:
        person, camera = person_and_camera(query)
        others = [person_and_camera(name) for name in split.gallery]
        assert any(p == person and c != camera for p, c in others)


def test_the_list_is_fixed():
    """The split depends on hashes, so no Python version changes it."""
    split = hold_out(NAMES, num_validation=2, seed=0)
    assert {name[:4] for name in split.gallery} == {"0002", "0012"}
    assert hold_out(reversed(NAMES), num_validation=2, seed=0) == split


def test_seeds_differ():
    held_out = [
        frozenset(n[:4] for n in hold_out(NAMES, num_validation=2, seed=seed).gallery)
        for seed in range(10)
    ]
    assert len(set(held_out)) > 1


def test_fewer_training_identities_keep_the_validation_set():
    whole = hold_out(NAMES, num_validation=2)
    part = hold_out(NAMES, num_validation=2, num_train=3)
    assert (part.query, part.gallery) == (whole.query, whole.gallery)
    assert len({name[:4] for name in part.train}) == 3
    assert set(part.train) < set(whole.train)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_validation": 6}, "cannot hold out 6 of 6 identities"),
        ({"num_validation": 0}, "cannot hold out 0"),
        (
            {"num_validation": 2, "num_train": 5},
            "cannot train on 5 identities: 4 of 6 remain",
        ),
    ],
)
def test_impossible_sizes_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        hold_out(NAMES, **sizes)


def test_unreadable_name_is_refused():
    with pytest.raises(ValueError, match=r"'person\.jpg' does not start with identity"):
        hold_out([*NAMES, "person.jpg"])


def test_data_set_is_made_of_links_once(market, tmp_path):
    sizes = {"num_validation": 2, "num_train": 0, "seed": 0}
    root = tmp_path / "split"
    split = make_split(market, root, **sizes)
    made = {
        part: sorted(file.name for file in (root / DATASET_FOLDER / part).iterdir())
        for part in ("bounding_box_train", "query", "bounding_box_test")
    }
    assert list(made.values()) == [[*split.train], [*split.query], [*split.gallery]]
    files = list((root / DATASET_FOLDER).glob("*/*.jpg"))
    assert all(file.is_symlink() and file.read_text() == file.name for file in files)

    (market / DATASET_FOLDER / "bounding_box_train" / NAMES[0]).unlink()
    assert make_split(market, root, **sizes) == split  # read, not created again
    with pytest.raises(ValueError, match="holds a split with other settings"):
        make_split(market, root, **{**sizes, "seed": 1})


def test_incomplete_split_is_created_again(market, tmp_path):
    sizes = {"num_validation": 2, "num_train": 0, "seed": 0}
    stale = tmp_path / "split.partial" / DATASET_FOLDER / "query"
    stale.mkdir(parents=True)
    (stale / "9999_c1.jpg").write_text("")
    split = make_split(market, tmp_path / "split", **sizes)
    query = (tmp_path / "split" / DATASET_FOLDER / "query").iterdir()
    assert sorted(file.name for file in query) == list(split.query)


def test_missing_data_are_named(market, tmp_path):
    with pytest.raises(FileNotFoundError, match="--data must be the folder that contains"):
        make_split(tmp_path, tmp_path / "s", num_validation=1, num_train=0, seed=0)
    assert not has_official_test(market)
    for part in ("query", "bounding_box_test"):
        (market / DATASET_FOLDER / part).mkdir()
    assert has_official_test(market)


def test_official_test_set_with_fewer_training_images(market, tmp_path):
    official = market / DATASET_FOLDER
    for part in ("query", "bounding_box_test"):
        (official / part).mkdir()
        (official / part / f"0001_c1_{part}.jpg").write_text(part)
        (official / part / "Thumbs.db").write_text("")
    root = tmp_path / "official"
    make_official(market, root, NAMES[:3])
    made = {
        part: {
            file.name: file.read_text() for file in (root / DATASET_FOLDER / part).iterdir()
        }
        for part in ("bounding_box_train", "query", "bounding_box_test")
    }
    assert list(made.values()) == [
        {name: name for name in NAMES[:3]},
        {"0001_c1_query.jpg": "query"},
        {"0001_c1_bounding_box_test.jpg": "bounding_box_test"},
    ]
    make_official(market, root, NAMES[:3])  # read, not created again
    with pytest.raises(ValueError, match="holds other training images"):
        make_official(market, root, NAMES[:4])


def test_hashes_do_not_follow_the_names_order():
    orders = [
        [n[:4] for n in hold_out(NAMES, num_validation=1, seed=seed).gallery[:1]]
        for seed in range(20)
    ]
    assert len(set(itertools.chain(*orders))) > 2

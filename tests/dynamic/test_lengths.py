import numpy as np
import pytest

from hcp_jax.dynamic.lengths import draw_lengths, mean_length


def test_a_lognormal_s_mean_is_that_of_the_clipped_lengths():
    lengths = draw_lengths("lognormal:mean=1024,sigma=1.5,min=128,max=8192", 100_000, 0)
    assert abs(lengths.mean() - 1024) < 15
    assert lengths.min() == 128
    assert lengths.max() == 8192


def test_uniform_and_mix_are_what_they_say():
    uniform = draw_lengths("uniform:min=3,max=5", 3000, 0)
    assert set(uniform) == {3, 4, 5}
    mix = draw_lengths("mix:0.90@2048,0.09@32768,0.01@262144", 20_000, 0)
    assert np.isclose((mix == 2048).mean(), 0.9, atol=0.01)
    assert np.isclose((mix == 262144).mean(), 0.01, atol=0.003)


def test_the_same_seed_draws_the_same():
    spec = "uniform:min=1,max=1000"
    assert np.array_equal(draw_lengths(spec, 50, 1), draw_lengths(spec, 50, 1))
    assert not np.array_equal(draw_lengths(spec, 50, 1), draw_lengths(spec, 50, 2))


@pytest.mark.parametrize(
    "text", ["7\n9\n11\n", "length\n7\n9\n11\n", "id,length\na,7\nb,9\nc,11\n"]
)
def test_a_csv_file_is_read_with_or_without_a_head(tmp_path, text):
    path = tmp_path / "lengths.csv"
    path.write_text(text)
    assert sorted(draw_lengths(str(path), 10, 0)) == [7, 9, 11]
    assert len(draw_lengths(str(path), 2, 0)) == 2
    assert mean_length(str(path)) == 9


def test_of_a_tokenised_folder_only_the_offsets_are_read(tmp_path):
    np.save(tmp_path / "offsets.npy", np.array([0, 7, 7, 16]))
    # A document of n tokens becomes n + 1 in training, with the separator.
    assert sorted(draw_lengths(str(tmp_path), 10, 0)) == [1, 8, 10]
    (tmp_path / "offsets.npy").unlink()
    with pytest.raises(ValueError, match="has no offsets.npy; hcp tokenize"):
        draw_lengths(str(tmp_path), 10, 0)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("gamma:min=1", "neither a file, nor a folder, nor one of"),
        ("uniform:min=1", "must be written uniform:min=…,max=…"),
        ("uniform:min=1,max=x", "'max=x' is not name=number"),
        ("uniform:min=5,max=2", "1 <= min <= max"),
        ("lognormal:mean=9,sigma=1,min=10,max=20", "min < mean < max"),
        ("mix:0.5@10", "shares that add up to 1"),
        ("mix:0.5", "share@length"),
    ],
)
def test_words_that_make_no_distribution_are_told(spec, words):
    with pytest.raises(ValueError, match=words):
        draw_lengths(spec, 5, 0)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a,b\n1,2\n", "call the one with lengths"),
        ("length\nx\n", "one integer"),
        ("", "no lengths"),
    ],
)
def test_a_file_without_lengths_is_told(tmp_path, text, words):
    path = tmp_path / "lengths.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=words):
        draw_lengths(str(path), 5, 0)


def test_mean_before_is_the_mean_before_clipping_as_other_benchmarks_give_it():
    """mu = ln(mean) - sigma² / 2, clipped afterwards: the mean of what is drawn is another one."""
    after = draw_lengths("lognormal:mean=1024,sigma=1.5,min=128,max=8192", 100_000, 0)
    before = draw_lengths("lognormal:mean_before=1024,sigma=1.5,min=128,max=8192", 100_000, 0)
    assert abs(after.mean() / 1024 - 1) < 0.01
    assert 0.85 < before.mean() / 1024 < 0.98
    share_below = np.mean(np.log(before) < np.log(1024) - 1.5**2 / 2)
    assert abs(share_below - 0.5) < 0.01, "mu is the median"
    with pytest.raises(ValueError, match="lognormal needs min < mean < max"):
        draw_lengths("lognormal:mean_before=1,sigma=1.5,min=128,max=8192", 1, 0)

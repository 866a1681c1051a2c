"""CC: the embeddings."""

from tests.distiller_zoo.helpers import build


def test_the_width_of_the_embeddings_is_a_flag():
    _, method = build("correlation", ("vgg13", "resnet8"), feat_dim=9)
    assert method.embed_s.linear.weight.shape == (9, 64) and method.embed_t.linear.weight.shape == (9, 512)

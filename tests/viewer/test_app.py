"""The API of a tiny run answers with the numbers of its study."""


def test_the_numbers_are_those_of_the_study(client, study):
    assert client.get("/api/about").json()["n_latents"] == study.n_latents
    for i in (0, 5, int(study.n_fired.argmax())):
        found = client.get(f"/api/latent/{i}").json()
        assert found["n_fired"] == study.n_fired[i]


def test_a_served_page_is_reached(viewer_url):
    import urllib.request

    with urllib.request.urlopen(viewer_url) as answer:
        assert b"<title>" in answer.read()

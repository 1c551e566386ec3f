"""An index of a random SAE that studies add columns to."""

from headscope.index.build import SAERecord, build_index

D_SAE = 20


def built(random_model, random_corpus, random_sae, folder, *, seed=0):
    model = random_model("gpt_neox")
    sae = random_sae(model, D_SAE)
    build_index(model, [(sae, SAERecord("s", f"sha256:{seed}"))], random_corpus(model, 6, 16, seed=seed), folder)
    return folder

"""AOTInductor: the model compiled ahead of time into a package that runs without its Python code."""

import argparse

import torch
from small_model import SmallModel, make_batch

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--output", default="small_model_compiled.pt2", help="file of the compiled package")
path = parser.parse_args().output

torch.manual_seed(0)
model = SmallModel().eval()
tokens, _ = make_batch(12, 64, seed=0)
batch_size, length = torch.export.Dim("batch_size", min=2), torch.export.Dim("length", min=2)

with torch.no_grad():
    program = torch.export.export(model, (tokens,), dynamic_shapes=({0: batch_size, 1: length},))
    torch._inductor.aoti_compile_and_package(program, package_path=path)
    package = torch._inductor.aoti_load_package(path)
    for number, shape in enumerate(((12, 64), (5, 30))):
        tokens, _ = make_batch(*shape, seed=number)
        expected, _ = model(tokens)
        logits, _ = package(tokens)
        difference = (logits - expected).abs().max().item()
        assert difference < 1e-4, difference
        print(f"{shape[0]} x {shape[1]} tokens: logits within {difference:.1e} of eager")

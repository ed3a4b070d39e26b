// Loads the model that ../torchscript.py saved, trains it one step and runs it. There is no Python in this process:
// including edl.h links libedl, and with it the operators that the saved model calls.
#include <edl/edl.h>
#include <torch/optim/sgd.h>
#include <torch/script.h>

#include <iostream>

int main(int argc, char** argv) {
  if (argc != 2) {
    std::cerr << "usage: run_scripted_model FILE, with a file that torchscript.py saved\n";
    return 2;
  }
  torch::jit::Module model = torch::jit::load(argv[1]);

  torch::manual_seed(0);
  const torch::Tensor tokens = torch::randint(96, {12, 64}, torch::kLong); // [B, S]
  const torch::Tensor domain_ids = torch::arange(12) % 3; //                  [B]

  std::vector<torch::Tensor> parameters;
  for (const torch::Tensor& parameter : model.parameters()) {
    parameters.push_back(parameter);
  }
  torch::optim::SGD optimizer(parameters, /*lr=*/0.1);
  const torch::Tensor before = model.forward({tokens, domain_ids}).toTensor();
  before.backward();
  optimizer.step();

  torch::NoGradGuard no_grad;
  const torch::Tensor after = model.forward({tokens, domain_ids}).toTensor();
  const torch::Tensor next = model.run_method("predict", tokens).toTensor();
  std::cout << "edl " << edl::version() << " on " << edl::cpu_instruction_set() << "\n"
            << "loss " << before.item<float>() << " before the step, " << after.item<float>() << " after\n"
            << "predicted " << next.size(0) << " x " << next.size(1) << " tokens\n";
  return after.item<float>() < before.item<float>() ? 0 : 1;
}

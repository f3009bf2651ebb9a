// Models and plans for Python. Everything is checked here, once; inside, the core trusts it.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <atomic>
#include <chrono>
#include <cmath>
#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "beam_search.h"
#include "binding_checks.h"
#include "isa.h"
#include "model.h"
#include "python_lock.h"

namespace py = pybind11;
using namespace py::literals;

namespace tt {
namespace {

// ---- checks ----

// A contiguous array of exactly this type and shape; nothing is converted behind the caller's back.
template <typename T>
py::array_t<T, py::array::c_style> Require(const std::string& name, const py::handle& object,
                                           const std::vector<py::ssize_t>& shape) {
  const std::string expected = "a contiguous " + py::str(py::dtype::of<T>()).cast<std::string>() +
                               " array of shape " +
                               py::str(py::tuple(py::cast(shape))).cast<std::string>();
  if (!py::isinstance<py::array>(object)) {
    Refuse(name, expected, py::str(py::type::of(object)).cast<std::string>());
  }
  const auto array = py::reinterpret_borrow<py::array>(object);
  if (!py::isinstance<py::array_t<T, py::array::c_style>>(array)) {
    Refuse(name, expected,
           py::str(array.dtype()).cast<std::string>() + ", strides " +
               py::str(array.attr("strides")).cast<std::string>());
  }
  if (!std::equal(shape.begin(), shape.end(), array.shape(), array.shape() + array.ndim())) {
    Refuse(name, expected, "shape " + ShapeText(array));
  }
  return py::reinterpret_borrow<py::array_t<T, py::array::c_style>>(array);
}

template <typename T>
void RequireFinite(const std::string& name, const T* data, size_t size) {
  for (size_t i = 0; i < size; ++i) {
    if (!std::isfinite(data[i])) Refuse(name, "finite numbers", Text(data[i]));
  }
}

std::vector<int32_t> RequireTokens(const std::string& name, const py::handle& object, int highest) {
  if (!py::isinstance<Tokens>(object)) {
    Refuse(name, "a contiguous int64 array", py::str(py::type::of(object)).cast<std::string>());
  }
  const auto array = py::reinterpret_borrow<Tokens>(object);
  if (array.ndim() != 1) Refuse(name, "1 dimension", "shape " + ShapeText(array));
  if (array.size() > (1 << 30)) Refuse(name, "at most 2**30 tokens", Text(array.size()));
  std::vector<int32_t> tokens(array.size());
  for (py::ssize_t i = 0; i < array.size(); ++i) {
    const int64_t token = array.data()[i];
    if (token < 0 || token > highest)
      Refuse(name, "ids in [0, " + Text(highest) + "]", Text(token));
    tokens[i] = static_cast<int32_t>(token);
  }
  return tokens;
}

Truncation MakeTruncation(const char* k_name, std::optional<int> k, const char* cdf_name,
                          std::optional<double> cdf, int num_ids) {
  Truncation truncation;
  if (k) truncation.top_k = InRange(k_name, *k, 1, num_ids);
  if (cdf) truncation.cdf = static_cast<float>(InRange(cdf_name, *cdf, 0.0, 1.0));
  return truncation;
}

float RequireTemperature(double temperature) {
  const float value = static_cast<float>(temperature);
  if (!std::isnormal(value) || value < 0.0f) {  // logits over less would overflow
    Refuse("temperature", "a positive number", Text(temperature));
  }
  return value;
}

// ---- model ----

class DictWeights : public WeightSource {
 public:
  explicit DictWeights(const py::dict& weights) : weights_(weights) {}

  const float* Get(const std::string& name, size_t size) const override {
    if (!weights_.contains(name)) Refuse("weights", "an array named " + name, "none");
    const py::object object = weights_[py::str(name)];
    if (!py::isinstance<Floats>(object)) {
      Refuse("weights[" + name + "]", "a contiguous float32 array",
             py::str(py::type::of(object)).cast<std::string>());
    }
    const auto array = py::reinterpret_borrow<Floats>(object);
    if (static_cast<size_t>(array.size()) != size) {
      Refuse("weights[" + name + "]", Text(size) + " numbers", "shape " + ShapeText(array));
    }
    RequireFinite("weights[" + name + "]", array.data(), size);
    return array.data();
  }

 private:
  const py::dict& weights_;
};

std::shared_ptr<Model> MakeModel(int observation_dim, int action_dim, int vocab_size,
                                 int num_transitions, int num_layers, int num_heads, int embed_dim,
                                 int goal_len, const py::dict& weights, const std::string& dtype,
                                 const std::string& isa) {
  const Shape shape{observation_dim, action_dim, vocab_size, num_transitions,
                    num_layers,      num_heads,  embed_dim,  goal_len};
  return std::make_shared<Model>(shape, DictWeights(weights), FindOps(isa), IsBf16(dtype));
}

// ---- plans ----

// A BeamSearch for Python: one call at a time, others wait without the interpreter's lock.
class PyBeamSearch {
 public:
  PyBeamSearch(std::shared_ptr<const Model> model, const py::array& hidden, int num_threads,
               double max_bytes)
      : shape_(model->shape) {
    const auto array = Require<uint8_t>("hidden", hidden, {shape_.goal_len + shape_.block_size()});
    if (array.data()[0]) Refuse("hidden", "a first position that can be seen", "1");
    InRange("num_threads", num_threads, 1, 1024);
    search_ = std::make_unique<BeamSearch>(
        std::move(model), std::vector<uint8_t>(array.data(), array.data() + array.size()),
        num_threads, max_bytes);
  }

  // One argument a setting: Python's keywords are the interface, and its errors name them.
  py::list Plan(const py::sequence& contexts, int horizon, int beam_width, int n_expand,
                double discount, int max_len, double temperature, std::optional<int> k_obs,
                std::optional<int> k_act, std::optional<int> k_rew, std::optional<double> cdf_obs,
                std::optional<double> cdf_act, std::optional<double> cdf_rew,
                std::optional<double> percentile, const py::array& thresholds,
                const std::vector<uint64_t>& seeds, const std::vector<uint32_t>& plan_indices,
                const py::object& uniforms, bool trace, const py::object& value_fn,
                std::optional<double> deadline_seconds);

  py::tuple Search(const py::array& context, int num_tokens, int beam_width, const py::object& goal,
                   std::optional<int> top_k, std::optional<double> cdf, double temperature);

  Floats Logits(const py::array& context, const py::object& goal);

  py::dict Stats() {
    PlanStats stats;
    {
      const Turn turn(*this);
      stats = search_->stats();
    }
    return py::dict("rows_asked"_a = stats.rows_asked,
                    "decoded_nodes"_a = stats.decoder.decoded_nodes,
                    "reencoded_nodes"_a = stats.decoder.reencoded_nodes,
                    "gemm_flops"_a = stats.decoder.gemm_flops,
                    "attention_flops"_a = stats.decoder.attention_flops,
                    "gemm_seconds"_a = stats.decoder.gemm_seconds,
                    "attention_seconds"_a = stats.decoder.attention_seconds,
                    "seconds"_a = stats.seconds, "bytes"_a = stats.bytes);
  }

  void ResetStats() {
    const Turn turn(*this);
    search_->ResetStats();
  }

  int num_threads() const { return search_->num_threads(); }

 private:
  // The right to use search_. The interpreter's lock is free while waiting and working: a plan
  // takes long and touches no Python object.
  class Turn {
   public:
    explicit Turn(PyBeamSearch& owner) : owner_(owner) {
      if (owner.user_.load() == std::this_thread::get_id()) {
        throw std::runtime_error("plan: called from its own value_fn");
      }
      without_lock_.emplace();
      owner.mutex_.lock();
      owner.user_.store(std::this_thread::get_id());
    }
    ~Turn() {
      owner_.user_.store(std::thread::id());
      owner_.mutex_.unlock();
    }

   private:
    PyBeamSearch& owner_;
    std::optional<WithoutLock> without_lock_;
  };

  PlanSettings ReadSizes(int horizon, int beam_width, int n_expand, int max_len) const;
  void ReadEstimators(const py::array& thresholds, std::optional<double> percentile,
                      PlanSettings& settings) const;
  std::vector<std::vector<int32_t>> ReadContexts(const py::sequence& contexts) const;
  std::optional<Doubles> ReadUniforms(const py::object& uniforms, size_t num_contexts,
                                      const PlanSettings& settings) const;
  py::list RunPlan(const PlanSettings& settings, PlanRequest& request);
  std::vector<int32_t> RequireContext(const py::array& context) const;
  std::vector<int32_t> RequireGoal(const py::object& goal) const;

  const Shape shape_;
  std::unique_ptr<BeamSearch> search_;
  std::mutex mutex_;
  std::atomic<std::thread::id> user_{};
};

// Lets Ctrl-C end a plan.
void CheckSignals() {
  WithLock([] {
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
  });
}

// One call of a value function.
void CallValueFunction(const py::object& value_fn, const Floats& probs, float* rewards,
                       float* values) {
  const py::ssize_t num_rows = probs.shape(0);
  const py::object result = CallOrSleep(value_fn, probs);
  const std::string expected = "a pair of arrays of shape (" + Text(num_rows) + ",)";
  if (!py::isinstance<py::sequence>(result) || py::len(result) != 2) {
    Refuse("value_fn", expected, py::str(py::type::of(result)).cast<std::string>());
  }
  const py::sequence pair(result);
  float* const outs[] = {rewards, values};
  for (int i = 0; i < 2; ++i) {
    const py::object item = pair[i];
    const py::array_t<float, py::array::c_style | py::array::forcecast> numbers(item);
    if (numbers.ndim() != 1 || numbers.size() != num_rows) {
      Refuse("value_fn", expected, "shape " + ShapeText(numbers));
    }
    RequireFinite("value_fn", numbers.data(), num_rows);
    std::copy_n(numbers.data(), num_rows, outs[i]);
  }
}

// Any callable of (num_rows, 2, num_ids) float32 that returns two arrays of (num_rows).
ValueFunction WrapValueFunction(const py::object& value_fn, int num_ids) {
  return [value_fn, num_ids](const float* probs, int num_rows, float* rewards, float* values) {
    WithLock([&] {
      CallValueFunction(value_fn, Floats({num_rows, 2, num_ids}, probs), rewards, values);
    });
  };
}

template <typename T>
py::array_t<T> ToArray(const std::vector<T>& data, std::vector<py::ssize_t> shape) {
  return py::array_t<T>(std::move(shape), data.data());
}

py::array_t<int64_t> ToTokens(const std::vector<int32_t>& data, std::vector<py::ssize_t> shape) {
  py::array_t<int64_t> array(std::move(shape));
  std::copy(data.begin(), data.end(), array.mutable_data());
  return array;
}

py::dict ToDict(const PlanResult& result, int transition_dim, bool trace) {
  const py::ssize_t steps = result.steps;
  py::dict out("tokens"_a = ToTokens(result.tokens, {steps, transition_dim}),
               "score"_a = result.score, "rewards"_a = ToArray(result.rewards, {steps}),
               "values"_a = ToArray(result.values, {steps}), "num_beams"_a = result.num_beams);
  if (!trace) return out;
  const py::ssize_t rows = static_cast<py::ssize_t>(result.candidate_scores.size()) / steps;
  const py::ssize_t kept = static_cast<py::ssize_t>(result.parents.size()) / steps;
  py::list drawn;
  for (const auto& tokens : result.drawn) {
    drawn.append(ToTokens(tokens, {static_cast<py::ssize_t>(tokens.size())}));
  }
  out["drawn"] = py::tuple(drawn);
  out["candidate_rewards"] = ToArray(result.candidate_rewards, {steps, rows});
  out["candidate_values"] = ToArray(result.candidate_values, {steps, rows});
  out["candidate_scores"] = ToArray(result.candidate_scores, {steps, rows});
  out["parents"] = ToTokens(result.parents, {steps, kept});
  out["beams"] = ToTokens(result.beams, {kept, steps * transition_dim});
  return out;
}

py::list PyBeamSearch::Plan(const py::sequence& contexts, int horizon, int beam_width, int n_expand,
                            double discount, int max_len, double temperature,
                            std::optional<int> k_obs, std::optional<int> k_act,
                            std::optional<int> k_rew, std::optional<double> cdf_obs,
                            std::optional<double> cdf_act, std::optional<double> cdf_rew,
                            std::optional<double> percentile, const py::array& thresholds,
                            const std::vector<uint64_t>& seeds,
                            const std::vector<uint32_t>& plan_indices, const py::object& uniforms,
                            bool trace, const py::object& value_fn,
                            std::optional<double> deadline_seconds) {
  if (shape_.goal_len > 0) {
    Refuse("model", "one without a goal", "goal_len " + Text(shape_.goal_len));
  }
  const int ids = shape_.num_ids();
  PlanSettings settings = ReadSizes(horizon, beam_width, n_expand, max_len);
  settings.discount = InRange("discount", discount, 0.0, 1.0);
  settings.temperature = RequireTemperature(temperature);
  settings.observation = MakeTruncation("k_obs", k_obs, "cdf_obs", cdf_obs, ids);
  settings.action = MakeTruncation("k_act", k_act, "cdf_act", cdf_act, ids);
  settings.reward = MakeTruncation("k_rew", k_rew, "cdf_rew", cdf_rew, ids);
  ReadEstimators(thresholds, percentile, settings);

  PlanRequest request;
  request.contexts = ReadContexts(contexts);
  const size_t count = request.contexts.size();
  if (seeds.size() != count) Refuse("seeds", Text(count) + " numbers", Text(seeds.size()));
  if (plan_indices.size() != count) {
    Refuse("plan_indices", Text(count) + " numbers", Text(plan_indices.size()));
  }
  request.seeds = seeds;
  request.plan_indices = plan_indices;
  const std::optional<Doubles> given = ReadUniforms(uniforms, count, settings);
  if (given) request.uniforms = given->data();
  request.trace = trace;
  if (!value_fn.is_none()) request.value_function = WrapValueFunction(value_fn, ids);
  request.interrupt = CheckSignals;
  if (deadline_seconds) {
    if (!(*deadline_seconds > 0.0)) {
      Refuse("deadline", "a positive number", Text(*deadline_seconds));
    }
    if (trace) Refuse("trace", "False with a deadline", "True");
    request.deadline_seconds = std::min(*deadline_seconds, 1e6);
  }
  return RunPlan(settings, request);
}

PlanSettings PyBeamSearch::ReadSizes(int horizon, int beam_width, int n_expand, int max_len) const {
  constexpr int kLimit = 1 << 20;
  const int dim = shape_.transition_dim();
  PlanSettings settings;
  settings.horizon = InRange("horizon", horizon, 1, kLimit);
  settings.beam_width = InRange("beam_width", beam_width, 1, kLimit);
  settings.n_expand = InRange("n_expand", n_expand, 1, kLimit);
  InRange("beam_width * n_expand", int64_t{beam_width} * n_expand, int64_t{1}, int64_t{kLimit});
  // one token less than whole transitions: what else would be cropped, the original never sees
  settings.max_len = InRange("max_len", max_len, dim - 1, shape_.block_size());
  if ((max_len + 1) % dim != 0) Refuse("max_len", "k * " + Text(dim) + " - 1", Text(max_len));
  if (horizon > 1 && max_len < 2 * dim - 1) {
    Refuse("max_len", "at least 2 transitions for a horizon > 1", Text(max_len));
  }
  return settings;
}

// thresholds (2, num_ids): of reward and value.
void PyBeamSearch::ReadEstimators(const py::array& thresholds, std::optional<double> percentile,
                                  PlanSettings& settings) const {
  const int ids = shape_.num_ids();
  const auto edges = Require<double>("thresholds", thresholds, {2, ids});
  RequireFinite("thresholds", edges.data(), edges.size());
  settings.reward_estimator.thresholds.assign(edges.data(), edges.data() + ids);
  settings.value_estimator.thresholds.assign(edges.data() + ids, edges.data() + 2 * ids);
  if (!percentile) return;
  settings.reward_estimator.percentile = settings.value_estimator.percentile =
      InRange("percentile", *percentile, 0.0, 1.0);
}

std::vector<std::vector<int32_t>> PyBeamSearch::ReadContexts(const py::sequence& contexts) const {
  const int dim = shape_.transition_dim(), rest = shape_.observation_dim;
  if (py::len(contexts) == 0) Refuse("contexts", "at least one", "none");
  std::vector<std::vector<int32_t>> read;
  for (size_t i = 0; i < py::len(contexts); ++i) {
    const std::string name = "contexts[" + Text(i) + "]";
    read.push_back(RequireTokens(name, contexts[i], shape_.vocab_size));
    if (read.back().size() % dim != static_cast<size_t>(rest)) {
      Refuse(name, "k * " + Text(dim) + " + " + Text(rest) + " tokens", Text(read.back().size()));
    }
  }
  return read;
}

// (num_contexts, num_draws, num_rows), or None.
std::optional<Doubles> PyBeamSearch::ReadUniforms(const py::object& uniforms, size_t num_contexts,
                                                  const PlanSettings& settings) const {
  if (uniforms.is_none()) return std::nullopt;
  const auto num_draws = static_cast<py::ssize_t>(settings.num_draws(shape_));
  const auto given =
      Require<double>("uniforms", uniforms,
                      {static_cast<py::ssize_t>(num_contexts), num_draws, settings.num_rows()});
  for (py::ssize_t i = 0; i < given.size(); ++i) {
    const double u = given.data()[i];
    if (!(u >= 0.0 && u < 1.0)) Refuse("uniforms", "numbers in [0, 1)", Text(u));
  }
  return given;
}

py::list PyBeamSearch::RunPlan(const PlanSettings& settings, PlanRequest& request) {
  std::vector<PlanResult> results;
  const auto asked = std::chrono::steady_clock::now();
  {
    const Turn turn(*this);
    if (request.deadline_seconds) {  // it does not wait for our turn
      const std::chrono::duration<double> waited = std::chrono::steady_clock::now() - asked;
      *request.deadline_seconds -= waited.count();
    }
    results = search_->Plan(settings, request);
  }
  py::list out;
  for (const PlanResult& result : results) {
    out.append(ToDict(result, shape_.transition_dim(), request.trace));
  }
  return out;
}

py::tuple PyBeamSearch::Search(const py::array& context, int num_tokens, int beam_width,
                               const py::object& goal, std::optional<int> top_k,
                               std::optional<double> cdf, double temperature) {
  SearchRequest request;
  request.context = RequireContext(context);
  request.num_tokens = InRange("num_tokens", num_tokens, 1, 1 << 24);
  request.beam_width = InRange("beam_width", beam_width, 1, 1 << 20);
  request.goal = RequireGoal(goal);
  request.truncation = MakeTruncation("top_k", top_k, "cdf", cdf, shape_.num_ids());
  request.temperature = RequireTemperature(temperature);
  request.interrupt = CheckSignals;
  SearchResult result;
  {
    const Turn turn(*this);
    result = search_->Search(request);
  }
  const auto size = [](const auto& v) { return static_cast<py::ssize_t>(v.size()); };
  return py::make_tuple(ToTokens(result.tokens, {size(result.tokens)}),
                        ToArray(result.log_probs, {size(result.log_probs)}));
}

Floats PyBeamSearch::Logits(const py::array& context, const py::object& goal) {
  const std::vector<int32_t> tokens = RequireContext(context), goal_tokens = RequireGoal(goal);
  std::vector<float> logits;
  {
    const Turn turn(*this);
    logits = search_->Logits(tokens, goal_tokens);
  }
  return ToArray(logits, {static_cast<py::ssize_t>(logits.size())});
}

std::vector<int32_t> PyBeamSearch::RequireContext(const py::array& context) const {
  std::vector<int32_t> tokens = RequireTokens("context", context, shape_.vocab_size);
  if (tokens.empty()) Refuse("context", "at least 1 token", "none");
  return tokens;
}

std::vector<int32_t> PyBeamSearch::RequireGoal(const py::object& goal) const {
  if (goal.is_none() != (shape_.goal_len == 0)) {
    Refuse("goal", shape_.goal_len > 0 ? "tokens" : "None", py::str(goal).cast<std::string>());
  }
  if (goal.is_none()) return {};
  std::vector<int32_t> tokens = RequireTokens("goal", goal, shape_.vocab_size - 1);
  if (static_cast<int>(tokens.size()) != shape_.goal_len) {
    Refuse("goal", Text(shape_.goal_len) + " tokens", Text(tokens.size()));
  }
  return tokens;
}

}  // namespace
}  // namespace tt

PYBIND11_MODULE(_core, m) {
  using namespace tt;
  m.doc() = "The C++ core. Private: use tt_fast.planning and tt_fast.training.";
  // plain classes, nothing to inherit from: an ordinary metaclass serves
  const py::metaclass type(reinterpret_cast<PyObject*>(&PyType_Type));
  py::class_<Model, std::shared_ptr<Model>>(m, "Model", type, py::is_final())
      .def(py::init(&MakeModel), py::kw_only(), "observation_dim"_a, "action_dim"_a, "vocab_size"_a,
           "num_transitions"_a, "num_layers"_a, "num_heads"_a, "embed_dim"_a, "goal_len"_a,
           "weights"_a, "dtype"_a, "isa"_a)
      .def_property_readonly("isa", [](const Model& model) { return model.ops.name; });
  py::class_<PyBeamSearch>(m, "BeamSearch", type, py::is_final())
      .def(py::init<std::shared_ptr<const Model>, const py::array&, int, double>(), "model"_a,
           "hidden"_a, "num_threads"_a, "max_bytes"_a)
      .def("plan", &PyBeamSearch::Plan, "contexts"_a, py::kw_only(), "horizon"_a, "beam_width"_a,
           "n_expand"_a, "discount"_a, "max_len"_a, "temperature"_a, "k_obs"_a, "k_act"_a,
           "k_rew"_a, "cdf_obs"_a, "cdf_act"_a, "cdf_rew"_a, "percentile"_a, "thresholds"_a,
           "seeds"_a, "plan_indices"_a, "uniforms"_a, "trace"_a, "value_fn"_a, "deadline_seconds"_a)
      .def("search", &PyBeamSearch::Search, "context"_a, py::kw_only(), "num_tokens"_a,
           "beam_width"_a, "goal"_a, "top_k"_a, "cdf"_a, "temperature"_a)
      .def("logits", &PyBeamSearch::Logits, "context"_a, "goal"_a)
      .def("stats", &PyBeamSearch::Stats)
      .def("reset_stats", &PyBeamSearch::ResetStats)
      .def_property_readonly("num_threads", &PyBeamSearch::num_threads);
  BindKernels(m);
  BindTraining(m);
}

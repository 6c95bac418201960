// Registration of the operators with TensorFlow: arguments and attributes as the schema has them,
// documentation, shape functions.
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "core/schema.h"
#include "tensorflow/core/framework/common_shape_fns.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/shape_inference.h"
#include "tf/attributes.h"

namespace performer {
namespace {

using tensorflow::shape_inference::InferenceContext;
using tensorflow::shape_inference::ShapeHandle;

Shape FromTensorFlow(InferenceContext* context, ShapeHandle handle) {
  if (!context->RankKnown(handle)) return Shape::UnknownRank();
  Shape shape;
  for (int i = 0; i < context->Rank(handle); ++i)
    shape.dims.push_back(context->Value(context->Dim(handle, i)));
  return shape;
}

ShapeHandle ToTensorFlow(InferenceContext* context, const Shape& shape) {
  if (!shape.known_rank) return context->UnknownShape();
  std::vector<tensorflow::shape_inference::DimensionHandle> dims;
  for (const int64_t dim : shape.dims)
    dims.push_back(dim == kUnknown ? context->UnknownDim() : context->MakeDim(dim));
  return context->MakeShape(dims);
}

template <Op op>
absl::Status InferOpShapes(InferenceContext* context) {
  Attributes attributes;
  TF_RETURN_IF_ERROR(ReadAttributes(context, op, &attributes));
  std::vector<Shape> inputs, outputs;
  for (int i = 0; i < context->num_inputs(); ++i)
    inputs.push_back(FromTensorFlow(context, context->input(i)));
  Dims dims;
  TF_RETURN_IF_ERROR(performer::ToTensorFlow(InferShapes(op, attributes, inputs, &dims, &outputs)));
  for (size_t i = 0; i < outputs.size(); ++i)
    context->set_output(static_cast<int>(i), ToTensorFlow(context, outputs[i]));
  return absl::OkStatus();
}

// Specifications in the syntax of OpDefBuilder.
std::string Specification(const Argument& argument) {
  return absl::StrCat(argument.name, ": ", NameOf(argument.type));
}
std::string Specification(const char* name, FeatureMap value) {
  return absl::StrCat(name, ": {'", absl::StrJoin(kFeatureMapNames, "', '"), "'} = '",
                      NameOf(value), "'");
}
std::string Specification(const char* name, double value) {
  return absl::StrCat(name, ": float = ", value);
}
std::string Specification(const char* name, int64_t value) {
  return absl::StrCat(name, ": int = ", value);
}
std::string Specification(const char* name, bool value) {
  return absl::StrCat(name, ": bool = ", value ? "true" : "false");
}

// The definition of an operator, from its schema.
template <Op op>
tensorflow::register_op::OpDefBuilderWrapper Define(const char* doc) {
  tensorflow::register_op::OpDefBuilderWrapper definition(SignatureOf(op).name);
  for (const Argument& input : SignatureOf(op).inputs) definition.Input(Specification(input));
  for (const Argument& output : SignatureOf(op).outputs) definition.Output(Specification(output));
  definition.Attr("T: {float, bfloat16, half, double}").Attr("U: {float, double} = DT_FLOAT");
  const Attributes defaults;
  VisitAttributes(defaults, [&](const char* name, const auto& value) {
    if (HasAttribute(op, name)) definition.Attr(Specification(name, value));
  });
  return definition.SetShapeFn(InferOpShapes<op>).Doc(doc);
}

[[maybe_unused]] const tensorflow::InitOnStartupMarker registered =
    tensorflow::InitOnStartupMarker{}
    << Define<Op::kSummarize>(R"doc(
Summarizes keys and values into the state of M features, the first half of linear attention.

With b[m, j] the log-feature m of key j plus key_bias[j]: log_mass[m] = logsumexp_j b[m, j], mean[m] = softmax_j(b[m, :]) value.

key: [B, S, G, D].
value: [B, S, G, E].
key_projection: [1 or G, M, D], rounded once to T.
key_bias: [1 or B, 1 or G, 1 or S], added to the log weight of each key; -inf masks it.
offsets: [N + 1], where packed sequences begin and end; ignored unless packed.
log_mass: [N, G, M], natural logarithms; -inf where nothing was seen.
mean: [N, G, M, E]; 0 where nothing was seen.
feature_map: log-feature of u = sqrt(scale) w.k: "softmax" u - scale |k|^2 / 2, "relu" log(max(u, 0) + feature_epsilon), "elu" log(elu(u) + 1).
scale: multiplies q.k; 0 stands for D**-0.5 for softmax and for 1 otherwise.
feature_epsilon: of the relu map.
packed: B is 1 and holds N sequences one after another; otherwise N = B.
key_norm: whether the softmax map subtracts scale |k|^2 / 2.
)doc")

    << Define<Op::kRead>(R"doc(
Reads a state with queries, the second half of linear attention.

With a[i, m] the log-feature m of query i plus feature_bias[m]: out[i] = softmax_m(a[i, :] + log_mass) mean.

query: [B, L, H, D]; H is a multiple of G, query head h reads head h // (H // G) of the state.
query_projection: [1, G or H, M, D], rounded once to T.
feature_bias: [1, G or H, M].
log_mass: [N, G, M].
mean: [N, G, M, E].
offsets: [N + 1], where packed sequences begin and end; ignored unless packed.
out: [B, L, H, E]; 0 where the state is empty.
)doc")

    << Define<Op::kCausal>(R"doc(
Causal linear attention: query i attends to the initial state and to keys j <= i. Later keys cannot change a bit of earlier rows.

A row has the same bits in a call of any length, with one exception: on the CPU, L = 1 without packed has a kernel of its own, which rounds otherwise.

query: [B, L, H, D].
key: [B, L, G, D].
value: [B, L, G, E].
query_projection: [1, G or H, M, D].
key_projection: [1 or G, M, D].
feature_bias: [1, G or H, M].
key_bias: [1 or B, 1 or G, 1 or L]; -inf masks a key.
initial_log_mass: [1 or N, G, M]; -inf for an empty state.
initial_mean: [1 or N, G, M, E].
offsets: [N + 1], where packed sequences begin and end; ignored unless packed.
out: [B, L, H, E]; 0 in rows that see no key.
log_mass: [N, G, M], of the state after the last row.
mean: [N, G, M, E].
)doc")

    << Define<Op::kNearFar>(R"doc(
Attention to near keys exactly and to far keys by features, in one softmax.

Rows come in blocks of exact_window, counted from position 0; key row j stands at position start + j, and query row i where key row i + S - L does. A key is near where its block is that of the query or a neighbour, and far beyond; if causal, only keys up to the query's own row are seen. With q and k times sqrt(scale), and the features w of the projections:

A[i, j] = exp(q.k + key_bias[j]) for near keys; for far keys (1/M) sum_m exp(w_m.q + feature_bias[m] - |q|^2 / 2 + w_m.k - |k|^2 / 2 + key_bias[j]). The keys of the initial state are far for every query. out[i] = sum_j A[i, j] value[j] / sum_j A[i, j].

query: [B, L, H, D]; if causal L <= S, otherwise and if packed L = S.
key: [B, S, G, D].
value: [B, S, G, E].
query_projection: [1, G or H, M, D], rounded once to T.
key_projection: [1 or G, M, D], rounded once to T.
feature_bias: [1, G or H, M].
key_bias: [1 or B, 1 or G, 1 or S]; -inf masks a key.
initial_log_mass: [1 or N, G, M]; -inf for an empty state.
initial_mean: [1 or N, G, M, E].
offsets: [N + 1], where packed sequences begin and end; ignored unless packed.
start: position of the first key row, at least 0, and 0 if packed.
out: [B, L, H, E]; 0 in rows that see no key.
log_weight: [B, L, H], log sum_j A[i, j]; -inf in rows that see no key.
log_mass: [N, G, M], of the final state: the initial state with all keys; if causal, with those keys only that lie two blocks or more before the row that would come next.
mean: [N, G, M, E].
scale: multiplies q.k; 0 stands for D**-0.5.
packed: B is 1 and holds N sequences one after another; otherwise N = B.
key_norm: whether |k|^2 / 2 is subtracted.
exact_window: rows of a block, at most 65536.
causal: whether a query sees keys up to its own row only.
query_norm: whether |q|^2 / 2 is subtracted.
)doc")

    << Define<Op::kSummarizeGrad>(
           "Gradient of Performer>Summarize for each of its inputs, summed over broadcast "
           "dimensions; that of the projection is 0 without projection_gradient.")

    << Define<Op::kReadGrad>(
           "Gradient of Performer>Read for each of its inputs, summed over broadcast dimensions; "
           "that of the projection is 0 without projection_gradient.")

    << Define<Op::kCausalGrad>(
           "Gradient of Performer>Causal for each of its inputs, summed over broadcast "
           "dimensions; without projection_gradient those of the projections are 0, and on GPUs "
           "that of feature_bias.")

    << Define<Op::kNearFarGrad>(
           "Gradient of Performer>NearFar for each of its inputs, summed over broadcast "
           "dimensions; without projection_gradient those of the projections are 0, and on GPUs "
           "that of feature_bias.");

}  // namespace
}  // namespace performer

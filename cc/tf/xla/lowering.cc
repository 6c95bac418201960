// XLA kernels: each operator becomes a custom call, which the handlers in _ops.so serve (handler.h
// has the contract). This is the only file of _xla.so, so that trouble with XLA leaves the rest
// alone, and the only one that includes xla_op_kernel.h, which takes half a minute to compile.
#include <cstring>
#include <map>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "core/schema.h"
#include "core/token.h"
#include "tensorflow/compiler/tf2xla/xla_op_kernel.h"
#include "tf/attributes.h"
#include "tf/registration.h"
#include "tf/xla/other_count.h"
#include "xla/hlo/builder/lib/constants.h"
#include "xla/hlo/builder/xla_builder.h"
#include "xla/shape_util.h"

namespace performer {
namespace {

using tensorflow::OpKernelConstruction;
using tensorflow::XlaOpKernel;
using tensorflow::XlaOpKernelContext;

// The attributes as the text of an MLIR dictionary.
std::string Text(FeatureMap map) { return absl::StrCat("\"", NameOf(map), "\""); }
std::string Text(double value) { return absl::StrFormat("%.17e : f64", value); }
std::string Text(int64_t value) { return absl::StrCat(value, " : i64"); }
std::string Text(bool value) { return value ? "true" : "false"; }
std::string Configuration(const Attributes& attributes) {
  std::vector<std::string> entries;
  VisitAttributes(attributes, [&](const char* name, const auto& value) {
    entries.push_back(absl::StrCat(name, " = ", Text(value)));
  });
  return absl::StrCat("{", absl::StrJoin(entries, ", "), "}");
}

xla::Shape RowMajor(xla::PrimitiveType type, const std::vector<int64_t>& dims) {
  return xla::ShapeUtil::MakeShapeWithDescendingLayout(type, dims);
}

// The number N of packed sequences may be known only when the program runs (where tf.where found
// their starts). XLA then compiles for an upper bound of N. The operator runs on that many
// sequences, of which the last are empty, and the results are cut. By the name of each input with
// such an N, the true N:
using Counts = std::map<std::string, xla::XlaOp>;

// Fills an input of known rank up to the bound, and notes its count. Empty sequences begin and end
// at `rows`.
absl::Status Pad(const Argument& argument, const xla::Shape& shape, int64_t rows, xla::XlaOp* input,
                 Counts* counts) {
  const std::string letter(argument.shape, std::strcspn(argument.shape, " "));
  bool only_n = letter == "N" || letter == "P" || letter == "N+1";
  for (int axis = 1; axis < static_cast<int>(shape.dimensions().size()); ++axis)
    only_n &= !shape.is_dynamic_dimension(axis);
  if (!only_n)
    return absl::UnimplementedError(
        absl::StrCat(argument.name, " must have a shape that is known when XLA compiles; got ",
                     xla::ShapeUtil::HumanString(shape)));
  xla::XlaBuilder* builder = input->builder();
  const bool offsets = argument.type == ArgumentType::kOffsets;
  const xla::XlaOp size = xla::GetDimensionSize(*input, 0);
  (*counts)[argument.name] = offsets ? size - xla::ConstantR0<int32_t>(builder, 1) : size;
  const xla::XlaOp row =
      xla::Iota(builder, xla::ShapeUtil::MakeShape(xla::S32, shape.dimensions()), 0);
  const xla::XlaOp fill =
      xla::Broadcast(xla::ConstantR0WithType(builder, shape.element_type(), offsets ? rows : 0),
                     shape.dimensions());
  const xla::XlaOp given = xla::RemoveDynamicDimension(*input, 0);
  *input = xla::Select(xla::Lt(row, size), given, fill);
  if (letter != "P") return absl::OkStatus();
  // One initial state is that of all sequences.
  std::vector<int64_t> ends(shape.dimensions().begin(), shape.dimensions().end());
  if (ends[0] == 0) return absl::OkStatus();
  ends[0] = 1;
  const xla::XlaOp first = xla::Slice(given, std::vector<int64_t>(ends.size(), 0), ends,
                                      std::vector<int64_t>(ends.size(), 1));
  std::vector<int64_t> axes(ends.size());
  std::iota(axes.begin(), axes.end(), 0);
  const xla::XlaOp one = xla::Eq(size, xla::ConstantR0<int32_t>(builder, 1));
  *input = xla::Select(xla::Broadcast(one, shape.dimensions()),
                       xla::BroadcastInDim(first, shape.dimensions(), axes), *input);
  return absl::OkStatus();
}

// The offsets; or, where an input has another number of sequences when the program runs, the mark of
// that input in place of the first (handler.h).
xla::XlaOp MarkOtherCounts(Op op, const std::vector<Shape>& shapes, const Counts& counts,
                           xla::XlaOp offsets) {
  const Signature& signature = SignatureOf(op);
  xla::XlaBuilder* builder = offsets.builder();
  const auto count_of = [&](size_t i, int64_t known) {
    const auto found = counts.find(signature.inputs[i].name);
    return found != counts.end() ? found->second
                                 : xla::ConstantR0<int32_t>(builder, static_cast<int32_t>(known));
  };
  const size_t at = OffsetsIndex(op);
  const xla::XlaOp sequences = count_of(at, shapes[at].dims[0] - 1);
  xla::XlaOp mark = xla::ConstantR0<int64_t>(builder, 0), states;  // P of its first input
  for (size_t i = 0; i < signature.inputs.size(); ++i) {
    const char* shape = signature.inputs[i].shape;
    if (std::strncmp(shape, "N ", 2) != 0 && std::strncmp(shape, "P ", 2) != 0) continue;
    const xla::XlaOp count = count_of(i, shapes[i].dims[0]);
    xla::XlaOp fits = xla::Eq(count, sequences);
    if (shape[0] == 'P') {
      if (!states.valid()) states = count;
      const xla::XlaOp one = xla::Eq(count, xla::ConstantR0<int32_t>(builder, 1));
      fits = xla::And(xla::Or(fits, one), xla::Eq(count, states));
    }
    mark = xla::Select(fits, mark, xla::ConstantR0<int64_t>(builder, MarkOfOtherCount(i)));
  }
  const xla::XlaOp first = xla::Slice(offsets, {0}, {1}, {1});
  const xla::XlaOp marked = xla::Select(xla::Eq(mark, xla::ConstantR0<int64_t>(builder, 0)),
                                        xla::Reshape(first, {}), mark);
  return xla::DynamicUpdateSlice(offsets, xla::Reshape(marked, {1}),
                                 {xla::ConstantR0<int32_t>(builder, 0)});
}

// Cuts an output to the true number of sequences.
xla::XlaOp Trim(const Argument& argument, xla::XlaOp output, const Counts& counts) {
  const std::string shape = argument.shape;
  const auto count = counts.find(shape[0] == '='             ? shape.substr(1)
                                 : shape.rfind("N ", 0) == 0 ? "offsets"
                                                             : "");
  return count == counts.end() ? output : xla::SetDimensionSize(output, count->second, 0);
}

template <Op op>
class PerformerXlaOp : public XlaOpKernel {
 public:
  explicit PerformerXlaOp(OpKernelConstruction* context) : XlaOpKernel(context) {
    OP_REQUIRES_OK(context, ReadAttributes(context, op, &attributes_));
    configuration_ = Configuration(attributes_);
    replaces_state_ = context->device_type() == tensorflow::DeviceType("XLA_CPU_JIT");
  }

  void Compile(XlaOpKernelContext* context) override {
    std::vector<xla::Shape> given;
    std::vector<Shape> inputs, outputs;
    for (int i = 0; i < context->num_inputs(); ++i) {
      const auto shape = context->InputXlaShape(i);
      OP_REQUIRES_OK(context, shape.status());
      const auto dims = shape->dimensions();
      inputs.push_back({true, {dims.begin(), dims.end()}});
      given.push_back(*shape);
    }
    Dims dims;
    OP_REQUIRES_OK(context, ToTensorFlow(InferShapes(op, attributes_, inputs, &dims, &outputs)));

    std::vector<xla::XlaOp> operands;
    std::vector<xla::Shape> operand_shapes;
    Counts counts;
    for (int i = 0; i < context->num_inputs(); ++i) {
      operands.push_back(context->Input(i));
      operand_shapes.push_back(RowMajor(given[i].element_type(), inputs[i].dims));
      if (given[i].is_dynamic())
        OP_REQUIRES_OK(context, Pad(SignatureOf(op).inputs[i], given[i], inputs[0].dims[1],
                                    &operands.back(), &counts));
    }
    if (!counts.empty())
      operands[OffsetsIndex(op)] = MarkOtherCounts(op, inputs, counts, operands[OffsetsIndex(op)]);
    std::vector<xla::Shape> results;
    for (size_t i = 0; i < outputs.size(); ++i)
      results.push_back(RowMajor(context->output_xla_type(static_cast<int>(i)), outputs[i].dims));

    // XLA copies an initial state that is used again.
    std::vector<std::pair<xla::ShapeIndex, std::pair<int64_t, xla::ShapeIndex>>> replaced;
    if (replaces_state_ && counts.empty() && IsToken(op, attributes_, dims))
      for (size_t i = 0; i < outputs.size(); ++i) {
        const int state = InitialStateOf(op, SignatureOf(op).outputs[i].name, dims, inputs);
        if (state >= 0) replaced.push_back({{static_cast<int64_t>(i)}, {state, {}}});
      }
    const bool tuple = results.size() > 1;
    const xla::XlaOp call = xla::CustomCallWithLayout(
        context->builder(), SignatureOf(op).name, operands,
        tuple ? xla::ShapeUtil::MakeTupleShape(results) : results[0], operand_shapes,
        configuration_, /*has_side_effect=*/false, /*output_operand_aliasing=*/replaced,
        /*literal=*/nullptr, xla::CustomCallSchedule::SCHEDULE_NONE,
        xla::CustomCallApiVersion::API_VERSION_TYPED_FFI);
    for (size_t i = 0; i < results.size(); ++i) {
      const xla::XlaOp result = tuple ? xla::GetTupleElement(call, i) : call;
      context->SetOutput(static_cast<int>(i), Trim(SignatureOf(op).outputs[i], result, counts));
    }
  }

 private:
  Attributes attributes_;
  std::string configuration_;
  bool replaces_state_ = false;
};

// A program has all shapes, and its buffers are XLA's: what AppendRows spares there is XLA's to spare.
class AppendRowsXlaOp : public XlaOpKernel {
 public:
  using XlaOpKernel::XlaOpKernel;
  void Compile(XlaOpKernelContext* context) override {
    context->SetOutput(
        0, xla::ConcatInDim(context->builder(), {context->Input(0), context->Input(1)}, 1));
  }
};

// REGISTER_XLA_OP is of no use here: its registry is read once, at the first compilation of the
// process, and a library that is loaded later would not be seen.
#define PERFORMER_REGISTER_TYPE(op, device, type, state)                                          \
  REGISTER_KERNEL_BUILDER(                                                                        \
      Name("Performer>" #op).Device(device).TypeConstraint<type>("T").TypeConstraint<state>("U"), \
      PerformerXlaOp<Op::k##op>);
#define PERFORMER_REGISTER_DEVICE(op, device)                      \
  PERFORMER_REGISTER_TYPE(op, device, float, float)                \
  PERFORMER_REGISTER_TYPE(op, device, tensorflow::bfloat16, float) \
  PERFORMER_REGISTER_TYPE(op, device, Eigen::half, float)
#define PERFORMER_REGISTER(op)                 \
  PERFORMER_REGISTER_DEVICE(op, "XLA_CPU_JIT") \
  PERFORMER_REGISTER_TYPE(op, "XLA_CPU_JIT", double, double)
// No GPU kernel takes float64.
#define PERFORMER_REGISTER_ON_GPU(op) PERFORMER_REGISTER_DEVICE(op, "XLA_GPU_JIT")
[[maybe_unused]] const bool registered = [] {
  if (IsRegistered("XLA_CPU_JIT")) return false;
  PERFORMER_FOR_EACH_OP(PERFORMER_REGISTER)
  PERFORMER_FOR_EACH_OP(PERFORMER_REGISTER_ON_GPU)
  REGISTER_KERNEL_BUILDER(Name("Performer>AppendRows").Device("XLA_CPU_JIT"), AppendRowsXlaOp);
  REGISTER_KERNEL_BUILDER(Name("Performer>AppendRows").Device("XLA_GPU_JIT"), AppendRowsXlaOp);
  return true;
}();

}  // namespace
}  // namespace performer

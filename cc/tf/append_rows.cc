// The operator AppendRows, and its OpKernel for the CPU: rows after rows, as tf.concat on axis 1.
//
// A stream appends a few rows to many in every step. Where B is 1, the rows lie in memory with room
// behind them, and the next ones are written there. Every tensor is a view of that memory. What a
// view shows never changes: rows are written only behind the last that were, which the memory
// keeps count of, so that of two calls that go on from the same rows the second one copies them.
#include <atomic>
#include <cstring>
#include <string>
#include <utility>

#include "tensorflow/core/common_runtime/dma_helper.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/shape_inference.h"
#include "tf/registration.h"

namespace performer {
namespace {

using tensorflow::Tensor;
using tensorflow::TensorShape;
using tensorflow::shape_inference::DimensionHandle;
using tensorflow::shape_inference::InferenceContext;
using tensorflow::shape_inference::ShapeHandle;

// Axis 1 is the sum of both, all others are equal.
absl::Status InferShape(InferenceContext* context) {
  ShapeHandle rows, more, result;
  TF_RETURN_IF_ERROR(context->WithRankAtLeast(context->input(0), 2, &rows));
  TF_RETURN_IF_ERROR(context->WithRankAtLeast(context->input(1), 2, &more));
  DimensionHandle sum;
  if (!context->RankKnown(rows) || !context->RankKnown(more)) {
    context->set_output(0, context->UnknownShape());
    return absl::OkStatus();
  }
  TF_RETURN_IF_ERROR(context->Add(context->Dim(rows, 1), context->Dim(more, 1), &sum));
  TF_RETURN_IF_ERROR(context->ReplaceDim(rows, 1, sum, &rows));
  TF_RETURN_IF_ERROR(context->ReplaceDim(more, 1, sum, &more));
  TF_RETURN_IF_ERROR(context->Merge(rows, more, &result));
  context->set_output(0, result);
  return absl::OkStatus();
}

// Memory of rows, the first `used` bytes of which hold some.
class RowsBuffer : public tensorflow::TensorBuffer {
 public:
  RowsBuffer(Tensor memory, int64_t used)
      : TensorBuffer(memory.data()), memory_(std::move(memory)), used_(used) {}
  size_t size() const override { return memory_.TotalBytes(); }
  TensorBuffer* root_buffer() override { return this; }
  void FillAllocationDescription(tensorflow::AllocationDescription* description) const override {
    description->set_requested_bytes(static_cast<int64_t>(size()));
  }
  // Bytes from the beginning to `at`.
  int64_t Offset(const char* at) const { return at - static_cast<const char*>(data()); }
  // Claims `count` bytes from `begin` on. False if they were claimed before, or are not there.
  bool Claim(int64_t begin, int64_t count) {
    if (count > static_cast<int64_t>(size()) - begin) return false;
    return used_.compare_exchange_strong(begin, begin + count);
  }

 private:
  const Tensor memory_;
  std::atomic<int64_t> used_;
};

class AppendRowsOp : public tensorflow::OpKernel {
 public:
  using OpKernel::OpKernel;

  // A copy of a few rows takes less time than to wake another thread for it.
  bool IsExpensive() override { return false; }

  void Compute(tensorflow::OpKernelContext* context) override {
    Tensor rows = context->input(0);
    const Tensor& more = context->input(1);
    TensorShape shape = rows.shape(), other = more.shape();
    OP_REQUIRES(
        context, shape.dims() >= 2 && shape.dims() == other.dims(),
        absl::InvalidArgumentError("rows and more must have the same rank, at least 2, got " +
                                   shape.DebugString() + " and " + other.DebugString()));
    const int64_t count = shape.dim_size(1), added = other.dim_size(1);
    OP_REQUIRES_OK(context, shape.SetDimWithStatus(1, count + added));
    OP_REQUIRES_OK(context, other.SetDimWithStatus(1, count + added));
    OP_REQUIRES(context, shape == other,
                absl::InvalidArgumentError("rows and more must agree on all axes but axis 1, got " +
                                           rows.shape().DebugString() + " and " +
                                           more.shape().DebugString()));
    TensorShape row = shape;  // [1, ...], of one row
    row.RemoveDim(0);
    if (count + added > 0) OP_REQUIRES_OK(context, row.SetDimWithStatus(0, 1));
    const int64_t bytes = row.num_elements() * tensorflow::DataTypeSize(rows.dtype());
    // Views have to be aligned, as other operators expect them.
    const bool extends = shape.dim_size(0) == 1 && bytes > 0 &&
                         bytes % EIGEN_MAX_ALIGN_BYTES == 0 && count > 0 && added <= count;
    if (!extends) {
      Tensor* output = nullptr;
      OP_REQUIRES_OK(context, context->allocate_output(0, shape, &output));
      Concatenate(rows, more, shape.dim_size(0), count * bytes, added * bytes, Data(*output));
      return;
    }
    RowsBuffer* buffer =
        dynamic_cast<RowsBuffer*>(tensorflow::DMAHelper::buffer(&rows)->root_buffer());
    int64_t begin = buffer ? buffer->Offset(Data(rows)) : 0;
    const bool has_room = buffer && begin % bytes == 0 &&
                          static_cast<int64_t>(buffer->size()) % bytes == 0 &&
                          buffer->Claim(begin + count * bytes, added * bytes);
    if (has_room) {
      buffer->Ref();
      std::memcpy(static_cast<char*>(buffer->data()) + begin + count * bytes, Data(more),
                  added * bytes);
    } else {
      row.set_dim(0, 2 * (count + added));
      Tensor memory;
      OP_REQUIRES_OK(context, context->allocate_temp(rows.dtype(), row, &memory));
      Concatenate(rows, more, 1, count * bytes, added * bytes, Data(memory));
      buffer = new RowsBuffer(std::move(memory), (count + added) * bytes);
      begin = 0;
    }
    row.set_dim(0, static_cast<int64_t>(buffer->size()) / bytes);
    const Tensor all(rows.dtype(), row, buffer);
    buffer->Unref();
    Tensor output;
    const bool fits =
        output.CopyFrom(all.Slice(begin / bytes, begin / bytes + count + added), shape);
    OP_REQUIRES(context, fits, absl::InternalError("a view has another size than its rows"));
    context->set_output(0, output);
  }

 private:
  static char* Data(const Tensor& tensor) { return static_cast<char*>(tensor.data()); }
  static void Concatenate(const Tensor& rows, const Tensor& more, int64_t batch, int64_t bytes,
                          int64_t more_bytes, char* to) {
    for (int64_t b = 0; b < batch; ++b, to += bytes + more_bytes) {
      if (bytes > 0) std::memcpy(to, Data(rows) + b * bytes, bytes);
      if (more_bytes > 0) std::memcpy(to + bytes, Data(more) + b * more_bytes, more_bytes);
    }
  }
};

[[maybe_unused]] const tensorflow::InitOnStartupMarker defined =
    tensorflow::InitOnStartupMarker{}
    << tensorflow::register_op::OpDefBuilderWrapper("Performer>AppendRows")
           .Input("rows: T")
           .Input("more: T")
           .Output("all: T")
           .Attr("T: {float, bfloat16, half, double}")
           .SetShapeFn(InferShape)
           .Doc(R"doc(
Rows, and more rows after them, as concat on axis 1.

On the CPU, for B = 1, the rows of an earlier result are not copied, but in one of about as many calls as there are rows.

rows: [B, R, ...].
more: [B, L, ...].
all: [B, R + L, ...].
)doc");

[[maybe_unused]] const bool registered = [] {
  if (!tensorflow::GetRegisteredKernelsForOp("Performer>AppendRows").kernel().empty()) return false;
  REGISTER_KERNEL_BUILDER(Name("Performer>AppendRows").Device(tensorflow::DEVICE_CPU),
                          AppendRowsOp);
  return true;
}();

}  // namespace
}  // namespace performer

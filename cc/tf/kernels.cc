// CPU OpKernels: tensors to a Call, one validation, then the driver on TensorFlow's own thread
// pool.
#include "core/params.h"
#include "cpu/run.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/tensor_shape.h"
#include "tf/attributes.h"

namespace performer {
namespace {

using tensorflow::OpKernel;
using tensorflow::OpKernelConstruction;
using tensorflow::OpKernelContext;
using tensorflow::Tensor;

DType FromTensorFlow(tensorflow::DataType type) {
  switch (type) {
    case tensorflow::DT_BFLOAT16:
      return DType::kBFloat16;
    case tensorflow::DT_HALF:
      return DType::kHalf;
    case tensorflow::DT_DOUBLE:
      return DType::kFloat64;
    default:
      return DType::kFloat32;
  }
}

template <Op op>
class PerformerOp : public OpKernel {
 public:
  explicit PerformerOp(OpKernelConstruction* context) : OpKernel(context) {
    tensorflow::DataType t;
    OP_REQUIRES_OK(context, context->GetAttr("T", &t));
    dtype_ = FromTensorFlow(t);
    OP_REQUIRES_OK(context, ReadAttributes(context, op, &attributes_));
  }

  void Compute(OpKernelContext* context) override {
    Call call;
    call.dtype = dtype_;
    call.attributes = attributes_;
    for (int i = 0; i < context->num_inputs(); ++i) {
      const Tensor& input = context->input(i);
      Shape shape;
      for (int d = 0; d < input.dims(); ++d) shape.dims.push_back(input.dim_size(d));
      call.input_shapes.push_back(shape);
      call.inputs.push_back(input.tensor_data().data());
    }
    std::vector<Shape> outputs;
    OP_REQUIRES_OK(context, ToTensorFlow(InferShapes(op, attributes_, call.input_shapes, &call.dims,
                                                     &outputs)));
    OP_REQUIRES_OK(context, ToTensorFlow(CheckOffsets(op, call)));
    for (size_t i = 0; i < outputs.size(); ++i) {
      tensorflow::TensorShape shape;
      OP_REQUIRES_OK(context, tensorflow::TensorShape::BuildTensorShape(outputs[i].dims, &shape));
      Tensor* output = nullptr;
      OP_REQUIRES_OK(context, context->allocate_output(static_cast<int>(i), shape, &output));
      call.outputs.push_back(const_cast<char*>(output->tensor_data().data()));
    }
    auto* pool = context->device()->tensorflow_cpu_worker_threads()->workers;
    const auto parallel_for = [pool](int64_t count, int64_t cost,
                                     const std::function<void(int64_t, int64_t)>& body) {
      pool->ParallelFor(count, tsl::thread::ThreadPool::SchedulingParams::Adaptive(cost), body);
    };
    OP_REQUIRES_OK(context, ToTensorFlow(cpu::Run(op, call, {pool->NumThreads(), parallel_for})));
  }

 private:
  DType dtype_ = DType::kFloat32;
  Attributes attributes_;
};

#define PERFORMER_REGISTER(name, op, type, state)             \
  REGISTER_KERNEL_BUILDER(Name(name)                          \
                              .Device(tensorflow::DEVICE_CPU) \
                              .TypeConstraint<type>("T")      \
                              .TypeConstraint<state>("U"),    \
                          PerformerOp<op>)
#define PERFORMER_REGISTER_ALL(name, op)                     \
  PERFORMER_REGISTER(name, op, float, float);                \
  PERFORMER_REGISTER(name, op, tensorflow::bfloat16, float); \
  PERFORMER_REGISTER(name, op, Eigen::half, float);          \
  PERFORMER_REGISTER(name, op, double, double)

PERFORMER_REGISTER_ALL("Performer>Summarize", Op::kSummarize);
PERFORMER_REGISTER_ALL("Performer>Read", Op::kRead);
PERFORMER_REGISTER_ALL("Performer>Causal", Op::kCausal);
PERFORMER_REGISTER_ALL("Performer>SummarizeGrad", Op::kSummarizeGrad);
PERFORMER_REGISTER_ALL("Performer>ReadGrad", Op::kReadGrad);
PERFORMER_REGISTER_ALL("Performer>CausalGrad", Op::kCausalGrad);

}  // namespace
}  // namespace performer

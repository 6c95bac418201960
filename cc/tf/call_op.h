// What the OpKernels of all devices share: they turn tensors into a Call and validate it once.
#pragma once
#include <string>

#include "core/near_far.h"
#include "core/params.h"
#include "core/token.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/tensor_shape.h"
#include "tf/attributes.h"

namespace performer {

inline DType FromTensorFlow(tensorflow::DataType type) {
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

// The input that an output equals to the bit, so that it takes no memory of its own; -1 for none. A
// token of a stream seldom moves a block of keys into the state.
inline int EqualInput(Op op, const Call& call, const char* output) {
  if (op != Op::kNearFar || !call.attributes.causal || call.attributes.packed) return -1;
  const int64_t window = call.attributes.exact_window;
  if (NearFarFinalBlocks(call.start % window, call.dims.keys, window) > 0) return -1;
  return InitialStateOf(op, output, call.dims, call.input_shapes);
}

// The input whose memory an output may take, where nobody else holds it; -1 for none. A token of a
// stream then changes its state in place.
inline int ReplacedInput(Op op, const Call& call, const char* output) {
  if (!IsToken(op, call.attributes, call.dims)) return -1;
  return InitialStateOf(op, output, call.dims, call.input_shapes);
}

// Device: a class with
//   static constexpr bool kReplacesState  whether a token may have its final state where the initial
//                                         one is
//   static absl::Status Check(Op, const Call&)  called before the outputs are allocated
//   static absl::Status Run(tensorflow::OpKernelContext*, Op, const Call&)
// The inputs "offsets" and "start" must lie in host memory, and all other tensors in that of the
// device.
template <Op op, class Device>
class CallOp : public tensorflow::OpKernel {
 public:
  explicit CallOp(tensorflow::OpKernelConstruction* context) : OpKernel(context) {
    tensorflow::DataType t;
    OP_REQUIRES_OK(context, context->GetAttr("T", &t));
    dtype_ = FromTensorFlow(t);
    OP_REQUIRES_OK(context, ReadAttributes(context, op, &attributes_));
  }

  void Compute(tensorflow::OpKernelContext* context) override {
    Call call;
    call.dtype = dtype_;
    call.attributes = attributes_;
    for (int i = 0; i < context->num_inputs(); ++i) {
      const tensorflow::Tensor& input = context->input(i);
      Shape shape;
      for (int d = 0; d < input.dims(); ++d) shape.dims.push_back(input.dim_size(d));
      call.input_shapes.push_back(shape);
      call.inputs.push_back(input.tensor_data().data());
    }
    std::vector<Shape> outputs;
    OP_REQUIRES_OK(context, ToTensorFlow(InferShapes(op, attributes_, call.input_shapes, &call.dims,
                                                     &outputs)));
    OP_REQUIRES_OK(context, ToTensorFlow(TakeOffsets(op, &call)));
    OP_REQUIRES_OK(context, Device::Check(op, call));
    for (size_t i = 0; i < outputs.size(); ++i) {
      const int equal = EqualInput(op, call, SignatureOf(op).outputs[i].name);
      if (equal >= 0) {
        context->set_output(static_cast<int>(i), context->input(equal));
        call.outputs.push_back(const_cast<void*>(call.inputs[equal]));
        continue;
      }
      tensorflow::TensorShape shape;
      OP_REQUIRES_OK(context, tensorflow::TensorShape::BuildTensorShape(outputs[i].dims, &shape));
      tensorflow::Tensor* output = nullptr;
      const int replaced =
          Device::kReplacesState ? ReplacedInput(op, call, SignatureOf(op).outputs[i].name) : -1;
      OP_REQUIRES_OK(context, replaced >= 0
                                  ? context->forward_input_or_allocate_output(
                                        {replaced}, static_cast<int>(i), shape, &output)
                                  : context->allocate_output(static_cast<int>(i), shape, &output));
      call.outputs.push_back(const_cast<char*>(output->tensor_data().data()));
    }
    OP_REQUIRES_OK(context, Device::Run(context, op, call));
  }

 private:
  DType dtype_ = DType::kFloat32;
  Attributes attributes_;
};

}  // namespace performer

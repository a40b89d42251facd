// SPDX-License-Identifier: Apache-2.0
#include "xla_ffi/tests/fake_xla.h"

#include <cstring>
#include <list>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "xla/ffi/api/c_api.h"

// XLA's own, of which handlers see pointers only.
struct XLA_FFI_Error {
  XLA_FFI_Error_Code code;
  std::string message;
};

// jax 0.11 brought version 0.4 of the interface, which renamed this.
#if XLA_FFI_API_MINOR < 4
struct XLA_FFI_ExecutionContext {
#else
struct XLA_FFI_InvokeContext {
#endif
  void* stream;
  int32_t device;
};

namespace {

const char* name_of(XLA_FFI_Error_Code code) {
  switch (code) {
    case XLA_FFI_Error_Code_INVALID_ARGUMENT: return "INVALID_ARGUMENT";
    case XLA_FFI_Error_Code_DEADLINE_EXCEEDED: return "DEADLINE_EXCEEDED";
    case XLA_FFI_Error_Code_RESOURCE_EXHAUSTED: return "RESOURCE_EXHAUSTED";
    case XLA_FFI_Error_Code_FAILED_PRECONDITION: return "FAILED_PRECONDITION";
    case XLA_FFI_Error_Code_INTERNAL: return "INTERNAL";
    default: return "OTHER";
  }
}

// --- what handlers call ------------------------------------------------------------------------

XLA_FFI_Error* create_error(XLA_FFI_Error_Create_Args* args) {
  return new XLA_FFI_Error{args->errc, args->message};
}

#if XLA_FFI_API_MINOR < 4
void get_message(XLA_FFI_Error_GetMessage_Args* args) {
  args->message = args->error->message.c_str();
}
#else
void get_details(XLA_FFI_Error_GetDetails_Args* args) {
  args->message = args->error->message.c_str();
  args->errc = args->error->code;
}
#endif

void destroy_error(XLA_FFI_Error_Destroy_Args* args) { delete args->error; }

XLA_FFI_Error* get_stream(XLA_FFI_Stream_Get_Args* args) {
  args->stream = args->ctx->stream;
  return nullptr;
}

XLA_FFI_Error* get_device(XLA_FFI_DeviceOrdinal_Get_Args* args) {
  args->device_ordinal = args->ctx->device;
  return nullptr;
}

// What else XLA offers is null: a handler that came to need it would not go unnoticed.
XLA_FFI_Api make_api() {
  XLA_FFI_Api api{};
  api.struct_size = XLA_FFI_Api_STRUCT_SIZE;
  api.api_version.struct_size = XLA_FFI_Api_Version_STRUCT_SIZE;
  api.api_version.major_version = XLA_FFI_API_MAJOR;
  api.api_version.minor_version = XLA_FFI_API_MINOR;
  api.XLA_FFI_Error_Create = create_error;
#if XLA_FFI_API_MINOR < 4
  api.XLA_FFI_Error_GetMessage = get_message;
#else
  api.XLA_FFI_Error_GetDetails = get_details;
#endif
  api.XLA_FFI_Error_Destroy = destroy_error;
  api.XLA_FFI_Stream_Get = get_stream;
  api.XLA_FFI_DeviceOrdinal_Get = get_device;
  return api;
}

// --- what they are called with -----------------------------------------------------------------

struct Buffers {
  Buffers(const FakeXlaBuffer* buffers, int32_t count) {
    for (int32_t i = 0; i < count; ++i) {
      const FakeXlaBuffer& from = buffers[i];
      XLA_FFI_Buffer& buffer = storage.emplace_back();
      buffer.struct_size = XLA_FFI_Buffer_STRUCT_SIZE;
      buffer.dtype = static_cast<XLA_FFI_DataType>(from.dtype);
      buffer.data = from.data;
      buffer.rank = from.rank;
      buffer.dims = const_cast<int64_t*>(from.dims);
      pointers.push_back(&buffer);
    }
    operand_types.assign(pointers.size(), XLA_FFI_ArgType_BUFFER);
    result_types.assign(pointers.size(), XLA_FFI_RetType_BUFFER);
  }

  std::list<XLA_FFI_Buffer> storage;
  std::vector<void*> pointers;
  std::vector<XLA_FFI_ArgType> operand_types;
  std::vector<XLA_FFI_RetType> result_types;
};

// Attributes of a call, or of a dictionary among them.
struct Attributes {
  void add(std::string_view name, const FakeXlaAttribute& from) {
    if (const size_t dot = name.find('.'); dot != std::string_view::npos) {
      const std::string_view dictionary = name.substr(0, dot);
      if (dictionaries.empty() || names.back() != dictionary) {
        add_entry(dictionary, XLA_FFI_AttrType_DICTIONARY, nullptr);
        dictionaries.push_back(std::make_unique<Attributes>());
      }
      dictionaries.back()->add(name.substr(dot + 1), from);
      return;
    }
    values.push_back(from.value);
    XLA_FFI_Scalar& scalar = scalars.emplace_back();
    scalar.dtype = static_cast<XLA_FFI_DataType>(from.dtype);
    scalar.value = &values.back();
    add_entry(name, XLA_FFI_AttrType_SCALAR, &scalar);
  }

  // Complete when nothing is added any more.
  XLA_FFI_Attrs view() {
    auto dictionary = dictionaries.begin();
    for (size_t i = 0; i < types.size(); ++i) {
      if (types[i] == XLA_FFI_AttrType_DICTIONARY) {
        pointers[i] = &views.emplace_back((*dictionary++)->view());
      }
    }
    XLA_FFI_Attrs attrs{};
    attrs.struct_size = XLA_FFI_Attrs_STRUCT_SIZE;
    attrs.size = static_cast<int64_t>(types.size());
    attrs.types = types.data();
    attrs.names = name_pointers.data();
    attrs.attrs = pointers.data();
    return attrs;
  }

 private:
  void add_entry(std::string_view name, XLA_FFI_AttrType type, void* value) {
    names.emplace_back(name);
    spans.push_back({names.back().data(), names.back().size()});
    name_pointers.push_back(&spans.back());
    types.push_back(type);
    pointers.push_back(value);
  }

  std::list<std::string> names;  // lists: what is in them stays where it is
  std::list<XLA_FFI_ByteSpan> spans;
  std::list<int64_t> values;
  std::list<XLA_FFI_Scalar> scalars;
  std::list<XLA_FFI_Attrs> views;
  std::vector<std::unique_ptr<Attributes>> dictionaries;
  std::vector<XLA_FFI_AttrType> types;
  std::vector<XLA_FFI_ByteSpan*> name_pointers;
  std::vector<void*> pointers;
};

}  // namespace

const char* jax_ep_fake_xla_call(const FakeXlaCall* call) {
  static const XLA_FFI_Api api = make_api();
  XLA_FFI_ExecutionContext context{call->stream, call->device};
  Buffers operands(call->operands, call->num_operands);
  Buffers results(call->results, call->num_results);
  Attributes attributes;
  for (int32_t i = 0; i < call->num_attributes; ++i) {
    attributes.add(call->attributes[i].name, call->attributes[i]);
  }
  XLA_FFI_CallFrame frame{};
  frame.struct_size = XLA_FFI_CallFrame_STRUCT_SIZE;
  frame.api = &api;
  frame.ctx = &context;
  frame.stage = XLA_FFI_ExecutionStage_EXECUTE;
  frame.args.struct_size = XLA_FFI_Args_STRUCT_SIZE;
  frame.args.size = call->num_operands;
  frame.args.types = operands.operand_types.data();
  frame.args.args = operands.pointers.data();
  frame.rets.struct_size = XLA_FFI_Rets_STRUCT_SIZE;
  frame.rets.size = call->num_results;
  frame.rets.types = results.result_types.data();
  frame.rets.rets = results.pointers.data();
  frame.attrs = attributes.view();
  auto* const handler = reinterpret_cast<XLA_FFI_Handler*>(call->handler);
  const std::unique_ptr<XLA_FFI_Error> error(handler(&frame));
  thread_local std::string answer;
  answer = error == nullptr ? "" : name_of(error->code) + (": " + error->message);
  return answer.c_str();
}

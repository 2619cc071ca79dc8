// SPDX-License-Identifier: Apache-2.0
// Instruction sets: what this machine offers, and which one the kernels use. No torch header here.
#pragma once

namespace flexquant {

// Ascending: of two that the machine offers, the later is preferred.
enum class Isa : int { kNone, kNeonDotprod, kAvx2, kAvxVnni, kAvx512Vnni, kAmxInt8 };

// "avx2" and so on, as users and flexquant_select_isa name them; "none" for kNone.
const char* isa_name(Isa isa) noexcept;

// Whether both the processor and the operating system offer it. To know this of kAmxInt8, the first call
// asks Linux for AMX tiles on behalf of the process, which it needs before it may use them.
bool isa_supported(Isa isa) noexcept;

// The best supported one until select_isa is called; kNone where the machine offers none.
Isa selected_isa() noexcept;

// False, and nothing changes, when it is not supported. Calls under way keep what they began with.
bool select_isa(Isa isa) noexcept;

}  // namespace flexquant

#include "textflag.h"

// Both loops write 16 bytes at a time, for which the address must be a
// multiple of 16: one 8-byte store at the front sees to that where needed, and
// more of them do the rest that is no 64 bytes. What is data, and begins at a
// multiple of 32, is written 32 bytes at a time if the processor can do that:
// 320 instructions for 4 KiB in place of 790.

// func store(dst, src unsafe.Pointer, n uintptr)
TEXT ·store(SB), NOSPLIT, $0-24
	MOVQ dst+0(FP), DI
	MOVQ src+8(FP), SI
	MOVQ n+16(FP), CX
	CMPQ CX, $8
	JB   done
	TESTQ $8, DI
	JZ   aligned
	MOVQ (SI), AX
	MOVNTIQ AX, (DI)
	ADDQ $8, SI
	ADDQ $8, DI
	SUBQ $8, CX

aligned:
	CMPQ CX, $256
	JB   narrow
	CMPB ·wide(SB), $0
	JEQ  narrow
	TESTQ $31, DI
	JNZ  narrow
	SUBQ $256, CX

blocks:
	VMOVDQU 0(SI), Y0
	VMOVDQU 32(SI), Y1
	VMOVDQU 64(SI), Y2
	VMOVDQU 96(SI), Y3
	VMOVDQU 128(SI), Y4
	VMOVDQU 160(SI), Y5
	VMOVDQU 192(SI), Y6
	VMOVDQU 224(SI), Y7
	VMOVNTDQ Y0, 0(DI)
	VMOVNTDQ Y1, 32(DI)
	VMOVNTDQ Y2, 64(DI)
	VMOVNTDQ Y3, 96(DI)
	VMOVNTDQ Y4, 128(DI)
	VMOVNTDQ Y5, 160(DI)
	VMOVNTDQ Y6, 192(DI)
	VMOVNTDQ Y7, 224(DI)
	ADDQ $256, SI
	ADDQ $256, DI
	SUBQ $256, CX
	JAE  blocks
	VZEROUPPER
	ADDQ $256, CX
	JZ   done

narrow:
	SUBQ $64, CX
	JB   rest

lines:
	MOVOU 0(SI), X0
	MOVOU 16(SI), X1
	MOVOU 32(SI), X2
	MOVOU 48(SI), X3
	MOVNTO X0, 0(DI)
	MOVNTO X1, 16(DI)
	MOVNTO X2, 32(DI)
	MOVNTO X3, 48(DI)
	ADDQ $64, SI
	ADDQ $64, DI
	SUBQ $64, CX
	JAE  lines

rest:
	ADDQ $64, CX
	JZ   done

words:
	MOVQ (SI), AX
	MOVNTIQ AX, (DI)
	ADDQ $8, SI
	ADDQ $8, DI
	SUBQ $8, CX
	JNZ  words

done:
	RET

// func storeZero(dst unsafe.Pointer, n uintptr)
TEXT ·storeZero(SB), NOSPLIT, $0-16
	MOVQ dst+0(FP), DI
	MOVQ n+8(FP), CX
	XORQ AX, AX
	PXOR X0, X0
	CMPQ CX, $8
	JB   done
	TESTQ $8, DI
	JZ   aligned
	MOVNTIQ AX, (DI)
	ADDQ $8, DI
	SUBQ $8, CX

aligned:
	SUBQ $64, CX
	JB   rest

lines:
	MOVNTO X0, 0(DI)
	MOVNTO X0, 16(DI)
	MOVNTO X0, 32(DI)
	MOVNTO X0, 48(DI)
	ADDQ $64, DI
	SUBQ $64, CX
	JAE  lines

rest:
	ADDQ $64, CX
	JZ   done

words:
	MOVNTIQ AX, (DI)
	ADDQ $8, DI
	SUBQ $8, CX
	JNZ  words

done:
	RET

// func fence()
TEXT ·fence(SB), NOSPLIT, $0-0
	SFENCE
	RET
